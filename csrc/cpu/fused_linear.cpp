// The masked linear layer and its d_x, with the mask fused into the packing of a GEMM (gemm.h).
//
// The activations are packed once per call. Each thread then takes blocks of the weight. It masks and packs a block
// into its own cache, multiplies it, and meanwhile prefetches the next block. Sums are accumulated in fp32 over the
// whole inner dimension, in an order that depends on neither the threads nor the cut into blocks.
#include "fused_linear.h"

#include "fused_parts.h"

namespace mft {
namespace {

#include "formats.inl"

constexpr int64_t kSumBytes = 4 << 20;  // sums of d_x that one thread keeps
constexpr int64_t kFarBlock = 512;      // rows of the weight in a task of multiply_few(), which reads kFarRows at once
constexpr int64_t kFarTurns = 16;       // turns of kFarRows rows whose sums are kept before they are stored
constexpr int64_t kRowBytes = kDepth * 4;  // one decoded row of an A block, before it is packed
constexpr int64_t kWordsAhead = 16;     // rows from the one that is packed to the one whose words are prefetched
constexpr int64_t kNearColumns = 2048;  // columns in a task of add_few(): 1,024 of 4,096 took 1.3 times as long

// Prefetches part of a row of the weight, and of its scores.
void prefetch_row(const Weight& weight, const MaskSource& mask, int64_t row, int64_t column, int64_t columns) {
  const auto bring = [&](const void* from, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(from) + b, 0, 2);
  };
  const Span span = weight.span(row, column, columns);
  bring(span.from, span.bytes);
  if (mask.scores != nullptr) bring(mask.row(row, column).scores, columns * bytes_of(mask.score_format));
}

// Prefetches the mask words of part of a row. The words of neighbouring rows lie too far apart for the processor's own
// prefetchers. Without this, words took longer to read than scores, which have 16 times as many bytes.
// Gain on Zen 4, 4096 x 4096, 16 to 64 tokens, bf16: forward 5 to 11 %, d_x up to 13 %. fp32, d_x of 16 tokens: 28 %.
void prefetch_words(const MaskSource& mask, int64_t row, int64_t column, int64_t columns) {
  if (mask.scores != nullptr) return;
  const uint32_t* words = mask.row(row, column).words;
  for (int64_t w = 0; w < divide_up(columns, 32); w += 16) __builtin_prefetch(words + w, 0, 2);
}

// A bias in fp32, to be added to the sums of d_x before they are rounded.
class ColumnBias {
 public:
  ColumnBias(const void* bias, Format format, int64_t columns) : widened_(bias != nullptr ? columns : 0) {
    if (bias != nullptr) widen(widened_.data(), bias, format, columns);
  }
  void add(float* sums, int64_t column, int64_t columns) const {
    if (widened_.empty()) return;
    for (int64_t j = 0; j < columns; ++j) sums[j] += widened_[column + j];
  }

 private:
  std::vector<float> widened_;
};

// The forward if all of packed x stays in the cache. Multiplies one tile's rows of the weight with all tokens at once.
template <typename PanelAt>
void multiply_narrow(const Gemm& gemm, const Matrix& y, const Weight& weight, const MaskSource& mask, const void* bias,
                     const Depth& depth, const PanelAt& panel_at) {
  const Cut rows(weight.rows, gemm.tile_rows, gemm.whole_tiles ? gemm.tile_rows : 1);
  const int64_t sum_stride = round_up(y.rows, kTileColumns), sums_size = gemm.tile_rows * sum_stride;
  const int64_t block_size = gemm.tile_rows * kRowStride;
  const Buffer<uint32_t> all_blocks(num_threads() * block_size);
  const Buffer<float> all_sums(num_threads() * sums_size);
  for_workers(rows.blocks, [&](int64_t worker, const auto& next) {
    uint32_t* a = all_blocks.get() + worker * block_size;
    float* sums = all_sums.get() + worker * sums_size;
    alignas(64) char decoded[kRowBytes];
    const Session session(gemm);
    for (int64_t task; (task = next()) < rows.blocks;) {
      const int64_t first = rows.begin(task), count = rows.end(task) - first;
      for (int64_t block = 0; block < depth.blocks(); ++block) {
        for (int64_t r = 0; r < count; ++r) {
          const int64_t later = r + gemm.rows_ahead, over = later >= count;  // over: a row of the next block
          if (block + over < depth.blocks()) {
            prefetch_row(weight, mask, first + later % count, depth.first(block + over), depth.length(block + over));
          }
          gemm.pack_masked_row(a + r * kRowStride,
                               weight.part(first + r, depth.first(block), depth.length(block), decoded),
                               mask.row(first + r, depth.first(block)), mask.score_format, depth.length(block));
        }
        for (int64_t token = 0; token < y.rows; token += kTileColumns) {
          gemm.multiply(sums + token, sum_stride, a, panel_at(block, token / kTileColumns), count, y.rows - token,
                        depth.groups(block), block > 0, nullptr);
        }
      }
      gemm.store_transposed(at(y, 0, first), y.row_stride, sums, sum_stride, count, y.rows,
                            skip(bias, first, y.format));
    }
  });
}

// Tokens of a run, at most kFewTileTokens. Their panels have `width` tokens. packed and sums: places of their first
// panel and sum, in tokens.
struct Piece {
  const MaskSource* mask;
  int64_t first, count, width, packed, sums;
};

std::vector<Piece> pieces_of(const std::vector<Run>& runs) {
  std::vector<Piece> pieces;
  int64_t packed = 0, sums = 0;
  for (const Run& run : runs) {
    for (int64_t first = run.first; first < run.end; first += kFewTileTokens) {
      const int64_t count = std::min(kFewTileTokens, run.end - first), width = std::min(round_up(count, 16), kTileColumns);
      pieces.push_back({&run.mask, first, count, width, packed, sums});
      packed += round_up(count, width);
      sums += round_up(count, 16);
    }
  }
  return pieces;
}

// What a call for piece p prefetches. If there are several masks, each prefetches its share of the next rows, so that
// memory is busy all the time. One mask prefetches 512 B ahead. This gains 5 % for 16 tokens. With more tokens the
// processor's own prefetchers have time enough, and it makes them 10 % slower. It slows small layers from scores too,
// because they have twice as many streams.
FarFetch fetch_of(const std::vector<Run>& runs, const std::vector<Piece>& pieces, int64_t p, int64_t row_bytes) {
  const auto count = static_cast<int64_t>(pieces.size());
  if (runs.size() > 1) return {kFarRows * p / count, kFarRows * (p + 1) / count, row_bytes};
  return {0, pieces[p].count <= 16 && pieces[p].mask->scores == nullptr ? kFarRows : 0, 512};
}

// d_x of few tokens. A thread reads kNearRows rows of the weight at once, each a stream of memory, and adds their
// products to sums that stay in L2.
void add_few(const Gemm& gemm, const Matrix& d_x, const Weight& weight, const MaskSource& mask, const ColumnBias& bias,
             const Depth& depth, const uint32_t* blocks, int64_t block_size) {
  const int64_t tokens = d_x.rows;
  const Cut columns(weight.columns, kNearColumns, kTileColumns);
  const int64_t tiles_size = round_up(tokens, 16) * kTileColumns;
  const int64_t sums_size = divide_up(columns.largest(), kTileColumns) * tiles_size;
  const Buffer<float> all_sums(num_threads() * sums_size);
  const std::vector<uint32_t> no_bits(divide_up(columns.largest(), 32));
  const int64_t row_bytes = weight.room(columns.largest());
  const Buffer<char> all_decoded(num_threads() * kNearRows * row_bytes);
  for_workers(columns.blocks, [&](int64_t worker, const auto& next) {
    float* sums = all_sums.get() + worker * sums_size;
    char* decoded = all_decoded.get() + worker * kNearRows * row_bytes;
    const Session session(gemm);
    for (int64_t task; (task = next()) < columns.blocks;) {
      const int64_t first = columns.begin(task), count = columns.end(task) - first;
      for (int64_t row = 0; row < weight.rows; row += kNearRows) {
        const void* from[kNearRows];
        const uint32_t* words[kNearRows];
        for (int64_t i = 0; i < kNearRows; ++i) {  // past the end, the last row with an empty mask
          if (weight.codes != nullptr) prefetch_row(weight, mask, row + i + kNearRows, first, count);
          from[i] = weight.part(std::min(row + i, weight.rows - 1), first, count, decoded + i * row_bytes);
          words[i] = row + i < weight.rows ? mask.row(row + i, first).words : no_bits.data();
        }
        const uint32_t* a = blocks + row / depth.block_elements() * block_size;
        gemm.add_near_rows(sums, tiles_size, a + row % depth.block_elements() / gemm.per_group, from, words, tokens, count,
                           row > 0);
      }
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t c = 0; c < count; c += kTileColumns) {
          float* row = sums + c / kTileColumns * tiles_size + t * kTileColumns;
          bias.add(row, first + c, std::min(kTileColumns, count - c));
          gemm.store_row(at(d_x, t, first + c), row, std::min(kTileColumns, count - c));
        }
      }
    }
  });
}

}  // namespace

// A thread reads rows of the weight that lie far apart at the same time, because several streams give more memory
// bandwidth than one. They meet the tokens of one run after the other while they are in its caches.
void fused_few_linear(const Gemm& gemm, const Matrix& y, const Matrix& x, const Weight& weight,
                      const std::vector<Run>& runs, const void* bias) {
  const std::vector<Piece> pieces = pieces_of(runs);
  const auto pieces_count = static_cast<int64_t>(pieces.size());
  const Piece& last = pieces.back();
  const Depth depth{x.columns, gemm.per_group};
  const int64_t groups = round_up(divide_up(x.columns, gemm.per_group), kDepthStep);
  const Buffer<uint32_t> panels((last.packed + round_up(last.count, last.width)) * groups);
  parallel_for(0, depth.blocks() * pieces_count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / pieces_count;
      const Piece& piece = pieces[i % pieces_count];
      for (int64_t t = 0; t < piece.count; t += piece.width) {
        gemm.pack_transposed_panel(panels.get() + (piece.packed + t) * groups + block * kDepth * piece.width,
                                   piece.width, at(x, piece.first + t, depth.first(block)), x.row_stride,
                                   std::min(piece.width, piece.count - t), depth.length(block));
      }
    }
  });

  const Cut rows(weight.rows, kFarBlock, kFarRows);
  const int64_t sum_stride = last.sums + round_up(last.count, 16), row_stride = kFarTurns * sum_stride;
  const Buffer<float> all_sums(num_threads() * kFarRows * row_stride);
  const int64_t row_bytes = weight.room(weight.columns);
  const Buffer<char> all_decoded(num_threads() * kFarRows * row_bytes);
  for_workers(rows.blocks, [&](int64_t worker, const auto& next) {
    float* sums = all_sums.get() + worker * kFarRows * row_stride;
    char* decoded = all_decoded.get() + worker * kFarRows * row_bytes;
    const Session session(gemm);
    for (int64_t task; (task = next()) < rows.blocks;) {
      const int64_t first = rows.begin(task), count = rows.end(task) - first, apart = divide_up(count, kFarRows);
      for (int64_t begin = 0; begin < apart; begin += kFarTurns) {
        const int64_t turns = std::min(kFarTurns, apart - begin);
        for (int64_t turn = 0; turn < turns; ++turn) {
          // Past the end, repeat the last row: it is not stored.
          const auto row_of = [&](int64_t i) { return first + std::min(i * apart + begin + turn, count - 1); };
          const void* from[kFarRows];
          for (int64_t i = 0; i < kFarRows; ++i) {
            if (weight.codes != nullptr) prefetch_row(weight, runs[0].mask, row_of(i) + 1, 0, weight.columns);
            from[i] = weight.part(row_of(i), 0, weight.columns, decoded + i * row_bytes);
          }
          for (int64_t p = 0; p < pieces_count; ++p) {
            const Piece& piece = pieces[p];
            MaskRow masks[kFarRows];
            for (int64_t i = 0; i < kFarRows; ++i) {
              masks[i] = piece.mask->row(row_of(i), 0);
              if (runs.size() > 1) prefetch_words(*piece.mask, row_of(i) + 1, 0, weight.columns);
            }
            gemm.multiply_far_rows(sums + turn * sum_stride + piece.sums, row_stride, from, masks,
                                   piece.mask->score_format, panels.get() + piece.packed * groups, weight.columns,
                                   piece.count,
                                   fetch_of(runs, pieces, p, weight.columns * bytes_of(weight.format)));
          }
        }
        for (int64_t i = 0; i < kFarRows && i * apart + begin < count; ++i) {
          const int64_t row = i * apart + begin;
          for (const Piece& piece : pieces) {
            gemm.store_transposed(at(y, piece.first, first + row), y.row_stride, sums + i * row_stride + piece.sums,
                                  sum_stride, std::min(turns, count - row), piece.count,
                                  skip(bias, first + row, y.format));
          }
        }
      }
    }
  });
}

// y.T tile = masked weight @ x.T: the weight's rows are rows of A as they lie in memory, and x.T is packed once.
void fused_masked_linear(const Gemm& gemm, const Matrix& y, const Matrix& x, const Weight& weight,
                         const MaskSource& mask, const void* bias) {
  const int64_t tokens = x.rows, token_tiles = divide_up(tokens, kTileColumns);
  if (gemm.multiply_far_rows != nullptr && tokens > 0 && tokens <= kMostFarTokens) {
    fused_few_linear(gemm, y, x, weight, {{mask, 0, tokens}}, bias);
    return;
  }
  const Depth depth{x.columns, gemm.per_group};
  const auto panel_size = [&](int64_t block) { return depth.packed_groups(block) * kTileColumns; };
  const int64_t last = depth.blocks() - 1, whole = last * kDepth * kTileColumns + panel_size(last);
  const Buffer<uint32_t> panels(whole * token_tiles);
  const auto panel_at = [&](int64_t block, int64_t tile) {
    return panels.get() + token_tiles * block * kDepth * kTileColumns + tile * panel_size(block);
  };
  parallel_for(0, depth.blocks() * token_tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / token_tiles, tile = i % token_tiles, first = tile * kTileColumns;
      gemm.pack_transposed_panel(panel_at(block, tile), kTileColumns, at(x, first, depth.first(block)), x.row_stride,
                                 std::min(kTileColumns, tokens - first), depth.length(block));
    }
  });

  if (token_tiles * kTileColumns * x.columns * bytes_of(x.format) <= gemm.narrow_bytes) {
    multiply_narrow(gemm, y, weight, mask, bias, depth, panel_at);
    return;
  }
  const Cut rows(weight.rows, gemm.weight_rows, gemm.whole_tiles ? gemm.tile_rows : 1);
  const int64_t chunk = std::min(round_up(tokens, kTileColumns), gemm.tokens);
  const int64_t block_rows = round_up(rows.largest(), gemm.tile_rows);
  const int64_t tiles_size = block_rows * kTileColumns;  // sums of 32 tokens, 128 B per row
  const int64_t sums_size = divide_up(chunk, kTileColumns) * tiles_size, block_size = block_rows * kRowStride;
  const int64_t workers = num_threads();
  const Buffer<float> all_sums(workers * sums_size);
  const Buffer<uint32_t> all_blocks(workers * block_size);
  for_workers(rows.blocks, [&](int64_t worker, const auto& next) {
    float* sums = all_sums.get() + worker * sums_size;
    uint32_t* a = all_blocks.get() + worker * block_size;
    alignas(64) char decoded[kRowBytes];
    Ahead ahead(gemm);
    const Session session(gemm);
    for (int64_t task = next(), upcoming; task < rows.blocks; task = upcoming) {
      upcoming = next();
      const int64_t first = rows.begin(task), count = rows.end(task) - first;
      for (int64_t token = 0; token < tokens; token += chunk) {
        const int64_t here = std::min(chunk, tokens - token);
        for (int64_t block = 0; block < depth.blocks(); ++block) {
          for (int64_t r = 0; r < count; ++r) {
            prefetch_words(mask, first + std::min(r + kWordsAhead, count - 1), depth.first(block), depth.length(block));
            if (gemm.rows_ahead > 0 && r + gemm.rows_ahead < count) {
              prefetch_row(weight, mask, first + r + gemm.rows_ahead, depth.first(block), depth.length(block));
            }
            gemm.pack_masked_row(a + r * kRowStride,
                                 weight.part(first + r, depth.first(block), depth.length(block), decoded),
                                 mask.row(first + r, depth.first(block)), mask.score_format, depth.length(block));
          }
          ahead.start_block(divide_up(here, kTileColumns) * divide_up(count, gemm.tile_rows), depth.groups(block));
          if (block + 1 < depth.blocks()) {
            ahead.add_late(weight, mask, first, first + count, depth.first(block + 1), depth.length(block + 1));
          } else if (token + chunk >= tokens && upcoming < rows.blocks) {
            ahead.add_late(weight, mask, rows.begin(upcoming), rows.end(upcoming), 0, depth.length(0));
          }
          for (int64_t t = 0; t < here; t += kTileColumns) {
            const uint32_t* b = panel_at(block, (token + t) / kTileColumns);
            ahead.add_soon(b + panel_size(block), panel_size(block) * 4);
            float* tiles = sums + t / kTileColumns * tiles_size;
            for_tile_rows(gemm, gemm.tile_rows, count, [&](int64_t begin, int64_t end) {
              gemm.prefetch_tile(tiles + end * kTileColumns, kTileColumns, gemm.tile_rows);
              gemm.multiply(tiles + begin * kTileColumns, kTileColumns, a + begin * kRowStride, b, end - begin, here - t,
                            depth.groups(block), block > 0, ahead.take());
            });
          }
        }
        for (int64_t t = 0; t < here; t += kTileColumns) {
          gemm.store_transposed(at(y, token + t, first), y.row_stride, sums + t / kTileColumns * tiles_size, kTileColumns,
                                count, std::min(kTileColumns, here - t),
                                skip(bias, first, y.format));
        }
      }
    }
  });
}

// d_x tile = grad_output @ masked weight: grad_output is packed once, groups of the weight's rows become panels.
void fused_grad_x(const Gemm& gemm, const Matrix& d_x, const Matrix& grad_output, const Weight& weight,
                  const MaskSource& mask, const void* bias) {
  const int64_t tokens = grad_output.rows;
  const ColumnBias added(bias, weight.format, weight.columns);
  const Depth depth{weight.rows, gemm.per_group};
  const int64_t block_size = tokens * kRowStride;
  const Buffer<uint32_t> blocks(depth.blocks() * block_size + gemm.tile_rows * kRowStride);
  parallel_for(0, depth.blocks() * tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / tokens, token = i % tokens;
      gemm.pack_row(blocks.get() + i * kRowStride, at(grad_output, token, depth.first(block)), depth.length(block));
    }
  });

  const bool few = gemm.add_near_rows != nullptr && mask.scores == nullptr && tokens > 0 && tokens <= kFewTileTokens;
  if (few) {
    add_few(gemm, d_x, weight, mask, added, depth, blocks.get(), block_size);
    return;
  }
  // A task takes whole memory pages of each row of the weight, as long as its sums fit the cache. It masks them in
  // pieces.
  const int64_t chunk = std::max<int64_t>(1, std::min(tokens, gemm.grad_tokens));
  const int64_t fitting = kSumBytes / 4 / chunk / gemm.weight_columns * gemm.weight_columns;
  const Cut columns(weight.columns, std::min(gemm.task_columns, std::max(fitting, gemm.weight_columns)), kTileColumns);
  const int64_t panel = gemm.grad_depth * kTileColumns + kTileColumns;
  const int64_t tiles_size = round_up(chunk, gemm.tile_rows) * kTileColumns;  // sums of 32 columns, 128 B per row
  const int64_t sums_size = divide_up(columns.largest(), kTileColumns) * tiles_size;
  const int64_t panels_size = gemm.weight_columns / kTileColumns * panel;
  const int64_t depth_rows = gemm.grad_depth * gemm.per_group;
  const int64_t workers = num_threads();
  const Buffer<float> all_sums(workers * sums_size);
  const Buffer<uint32_t> all_panels(workers * panels_size);
  const int64_t row_bytes = weight.room(gemm.weight_columns);
  const Buffer<char> all_decoded(workers * 2 * row_bytes);
  for_workers(columns.blocks, [&](int64_t worker, const auto& next) {
    float* sums = all_sums.get() + worker * sums_size;
    uint32_t* panels = all_panels.get() + worker * panels_size;
    char *decoded = all_decoded.get() + worker * 2 * row_bytes, *decoded_odd = decoded + row_bytes;
    Ahead ahead(gemm);
    const Session session(gemm);
    for (int64_t task; (task = next()) < columns.blocks;) {
      const int64_t first = columns.begin(task), end_column = columns.end(task);
      // Nearly equal pieces: 288 columns become 144 and 144. Pieces of 256 and 32 took up to 9 % longer (bf16, 24 to
      // 128 tokens, 1536 x 576 and, with tasks of 864 columns, 3072 x 5120; Zen 4). There is no difference if a task
      // has whole blocks.
      const int64_t piece = nearly_equal(end_column - first, gemm.weight_columns, kTileColumns);
      for (int64_t token = 0; token < tokens; token += chunk) {
        const int64_t here = std::min(chunk, tokens - token);
        for (int64_t row = 0; row < weight.rows; row += depth_rows) {
          const int64_t end_row = std::min(weight.rows, row + depth_rows);
          const int64_t groups = divide_up(end_row - row, gemm.per_group);
          const uint32_t* a = blocks.get() + row / depth.block_elements() * block_size + token * kRowStride +
                              row % depth.block_elements() / gemm.per_group;
          for (int64_t column = first; column < end_column; column += piece) {
            const int64_t count = std::min(piece, end_column - column);
            for (int64_t r = row; r < end_row; r += gemm.per_group) {
              const int64_t odd = std::min(r + 1, end_row - 1);
              prefetch_words(mask, std::min(r + kWordsAhead, weight.rows - 1), column, count);
              prefetch_words(mask, std::min(odd + kWordsAhead, weight.rows - 1), column, count);
              for (int64_t i = r; gemm.rows_ahead > 0 && i < r + gemm.per_group; ++i) {
                const int64_t later = std::min(i + 2 * gemm.rows_ahead, end_row - 1);
                prefetch_row(weight, mask, later, column, count);
              }
              gemm.pack_masked_group(panels + (r - row) / gemm.per_group * kTileColumns, panel,
                                     weight.part(r, column, count, decoded),
                                     r + 1 < end_row ? weight.part(odd, column, count, decoded_odd) : nullptr,
                                     mask.row(r, column), mask.row(odd, column), mask.score_format, count);
            }
            fill_depth(panels, panel, groups, count);
            ahead.start_block(divide_up(here, gemm.tile_rows) * divide_up(count, kTileColumns), groups);
            if (column + count < end_column) {
              ahead.add_late(weight, mask, row, end_row, column + count, std::min(piece, end_column - column - count));
            } else {
              ahead.add_late(weight, mask, end_row, std::min(weight.rows, end_row + depth_rows), first,
                             std::min(piece, end_column - first));
            }
            for (int64_t c = 0; c < count; c += kTileColumns) {
              const uint32_t* b = panels + c / kTileColumns * panel;
              float* tiles = sums + (column - first + c) / kTileColumns * tiles_size;
              for_tile_rows(gemm, gemm.tile_rows, here, [&](int64_t begin, int64_t end) {
                for (int64_t r = end; c == 0 && r < std::min(here, end + gemm.tile_rows); ++r) {
                  ahead.add_soon(a + r * kRowStride, 4 * groups);
                }
                gemm.prefetch_tile(tiles + end * kTileColumns, kTileColumns, gemm.tile_rows);
                gemm.multiply(tiles + begin * kTileColumns, kTileColumns, a + begin * kRowStride, b, end - begin,
                              count - c, groups, row > 0, ahead.take());
              });
            }
          }
        }
        for (int64_t t = 0; t < here; ++t) {
          for (int64_t c = first; c < end_column; c += kTileColumns) {
            float* row = sums + (c - first) / kTileColumns * tiles_size + t * kTileColumns;
            added.add(row, c, std::min(kTileColumns, end_column - c));
            gemm.store_row(at(d_x, token + t, c), row, std::min(kTileColumns, end_column - c));
          }
        }
      }
    }
  });
}

}  // namespace mft
