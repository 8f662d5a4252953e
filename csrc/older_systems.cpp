// Symbols that the headers of a newer glibc or libstdc++ require and the libraries of older systems lack. They are
// defined here, so a library built on this system loads on older ones too (building/older_systems.py says from which
// version on, and does the rest).
#include <new>
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// glibc 2.32: whether there is only one thread, so that counts need no lock. Here it is always 0: there may be more.
extern "C" {
__attribute__((visibility("hidden"))) char mft_libc_single_threaded __asm__("__libc_single_threaded") = 0;
}

// GCC 9 and 11: these are in namespace std, whose visibility we cannot set. If libstdc++ has them too, either will do.
namespace std {
void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

#endif
