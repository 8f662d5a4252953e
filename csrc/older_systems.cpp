// What headers of a newer glibc or libstdc++ ask for and the libraries of older systems lack, defined here: so a library
// built on this system loads on those too (building/older_systems.py says from which on, and does the rest).
#include <new>
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)

// glibc 2.32: whether there is one thread alone, for counts that need no lock then. Here there may always be more.
extern "C" {
__attribute__((visibility("hidden"))) char mft_libc_single_threaded __asm__("__libc_single_threaded") = 0;
}

// GCC 9 and 11: in namespace std, whose visibility is not ours to say. Where libstdc++ has them too, either will do.
namespace std {
void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();

#endif
