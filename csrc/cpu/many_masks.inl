// Rows of the weight meet the tokens of several masks, one mask after the other while the rows are in the caches. So
// only the first mask waits for memory. Included by few_tokens.inl. The sums equal those of dot() bit for bit.

// Multiplies one token with kRows rows. All rows exist, and no columns are left over. Rows are addressed by their
// distance: pointers to 8 rows and their masks would need more registers than there are. 8 masks at 576 x 576 in bf16
// took 104 us this way and 125 us by dot_block() (one thread of a Xeon with AMX).
template <typename Kind, int kRows>
void dot_one(const FewTokens& call, const typename Kind::Element* weight, const uint32_t* words, int64_t words_apart,
             int64_t first_row, int64_t apart) {
  constexpr int kColumns = Kind::kPair == 2 ? kStep : kUnit;
  const int64_t weights_apart = apart * call.columns;
  Floats sums[kRows][1];
  MFT_UNROLL
  for (int r = 0; r < kRows; ++r) sums[r][0] = zeros();
  for (int64_t j = 0; j < call.columns; j += kStep) {
    asm("" : "+r"(weight), "+r"(words));  // else the compiler would compute all pointers before the loop
    const typename Kind::Element* from[kRows];
    uint32_t bits[kRows];
    MFT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      from[r] = weight + r * weights_apart;
      bits[r] = words[r * words_apart + j / kStep];
    }
    MFT_UNROLL
    for (int u = 0; u < kStep; u += kColumns) {
      Dot<Kind, kRows, 1>::add(sums, from, bits, u, call.tokens, 0, j + u);
    }
  }
  store_dots<Kind, kRows, 1>(call, sums, first_row, kRows, apart, 0);
}

template <typename Kind>
void dot_many_rows(const FewTokens* calls, int64_t count, int64_t first_row, int64_t end_row) {
  using Element = typename Kind::Element;
  constexpr int64_t kRows = kDotRows, kLine = 64 / sizeof(Element);
  const int64_t columns = calls[0].columns, words_stride = (columns + kStep - 1) / kStep;
  const int64_t part = (end_row - first_row + kRows - 1) / kRows;  // see dot_rows()
  for (int64_t row = first_row; row < first_row + part; ++row) {
    const int64_t rows = (end_row - row + part - 1) / part;
    const Element* weight[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t mine = row + smaller(r, rows - 1) * part;
      weight[r] = reinterpret_cast<const Element*>(weight_row(calls[0], mine));
    }
    for (int64_t c = 0; c < count; ++c) {
      const FewTokens& call = calls[c];
      // Each mask prefetches its share of the next rows, so that memory is busy all the time.
      const int64_t share = (columns * (c + 1) / count + kLine - 1) / kLine * kLine;
      const auto fetch = [&](int64_t first, int64_t end) {
        if (sizeof(Element) == 4) return;
        for (int64_t r = first; r < end; ++r) {
          for (int64_t j = columns * c / count / kLine * kLine; j < share; j += kLine) prefetch(weight[r] + columns + j);
        }
      };
      const uint32_t* words[kRows];
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t mine = row + smaller(r, rows - 1) * part;
        words[r] = words_of(call, mine, 0, columns, 1, nullptr);
      }
      if (call.count == 1 && rows == kRows && columns % kStep == 0) {
        fetch(0, rows);
        dot_one<Kind, kRows>(call, weight[0], words[0], call.keeps_all ? 0 : words_stride * part, row, part);
      } else {
        for (int64_t r = 0; r < rows; r += kManyRows) {
          fetch(r, smaller(r + kManyRows, rows));
          dot_tokens<Kind, kManyRows, true>(call, weight + r, words + r, row + r * part, rows - r, part, false);
        }
      }
    }
  }
}

void dot_many(const FewTokens* calls, int64_t count, int64_t first_row, int64_t end_row) {
  with_kind(calls[0].format, [&](auto kind) { dot_many_rows<decltype(kind)>(calls, count, first_row, end_row); });
}
