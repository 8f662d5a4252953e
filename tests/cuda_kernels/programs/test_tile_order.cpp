// tile_at of tile_sm90.h: panels of 8 token tiles; within a panel, the feature tiles in order, each with all its
// tokens.
#include <algorithm>
#include <cstdio>

#include "tile_sm90.h"

using namespace mft::cuda;

int main() {
  int mistakes = 0;
  for (int features = 1; features <= 20; ++features) {
    for (int tokens = 1; tokens <= 40; ++tokens) {
      int index = 0;
      for (int panel = 0; panel < tokens; panel += 8) {
        for (int feature = 0; feature < features; ++feature) {
          for (int token = panel; token < std::min(panel + 8, tokens); ++token, ++index) {
            const Tile tile = tile_at(index, features, tokens);
            if (tile.feature == feature && tile.token == token) continue;
            if (++mistakes > 10) continue;
            std::printf("tile %d of %d x %d: got feature %d, token %d, expected %d, %d\n", index, features, tokens,
                        tile.feature, tile.token, feature, token);
          }
        }
      }
    }
  }
  std::printf("%d mistakes\n", mistakes);
  return mistakes != 0;
}
