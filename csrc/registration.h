// Ops that are registered after loading, under a namespace that the loader names. torch's own macros register while a
// library loads, under a name of compile time, so that two builds in one process would clash: the installed package's
// and one from the Kernel Hub (docs/how-to/kernel-hub.md). A hub's cache may also give both the same file.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <exception>
#include <set>
#include <string>

// Hidden whatever the flags: lists that are one in the whole process would mix the libraries' ops.
namespace mft {
namespace registration __attribute__((visibility("hidden"))) {

using Library = torch::stable::detail::StableLibrary;

// One block of ops, all served on one dispatch key. In a list, as the files of ops are many.
struct Block {
  void (*add)(Library& schemas, Library& kernels);
  const char* key;
  uint32_t line;
  const char* file;
  const Block* next;

  static inline const Block* first = nullptr;

  Block(void (*add_)(Library&, Library&), const char* key_, const char* file_, uint32_t line_)
      : add(add_), key(key_), line(line_), file(file_), next(first) {
    first = this;
  }
};

// Registers all blocks. Returns why not, or nullptr; a second time for a namespace does nothing.
inline const char* register_ops(const char* name) {
  static std::set<std::string> done;
  static std::string error;
  if (!done.insert(name).second) return nullptr;
  try {
    for (const Block* block = Block::first; block != nullptr; block = block->next) {
      // Never freed: what an entry of the dispatcher's lives by, until the process ends.
      auto* schemas = new Library(Library::Kind::FRAGMENT, name, nullptr, block->file, block->line);
      auto* kernels = new Library(Library::Kind::IMPL, name, block->key, block->file, block->line);
      block->add(*schemas, *kernels);
    }
  } catch (const std::exception& failed) {
    done.erase(name);
    error = failed.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace registration
}  // namespace mft

// What mft_kernels/backends/built.py calls, while it holds Python's lock.
extern "C" __attribute__((visibility("default"), used)) inline const char* mft_register_ops(const char* name) {
  return mft::registration::register_ops(name);
}

// MFT_OPS(CPU) { MFT_OP(function, "(Tensor x) -> Tensor"); }
#define MFT_OPS(key) MFT_BLOCK_(C10_CONCATENATE(mft_ops_, C10_UID), C10_STRINGIZE(key))
#define MFT_OP(function, arguments) \
  schemas.def(#function arguments), kernels.impl(#function, TORCH_BOX(&function))
#define MFT_BLOCK_(name, key)                                                                            \
  static void name(mft::registration::Library& schemas, mft::registration::Library& kernels);            \
  static const mft::registration::Block C10_CONCATENATE(name, _block)(&name, key, __FILE__, __LINE__);   \
  static void name(mft::registration::Library& schemas, mft::registration::Library& kernels)
