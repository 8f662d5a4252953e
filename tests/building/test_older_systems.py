"""Libraries built here load on systems with an older glibc."""

import ctypes
import platform

import pytest

from building import older_systems
from building.compile import Link, Unit, build, find_compiler
from mft_kernels.backends import built

THREADED = """
#include <dlfcn.h>
#include <pthread.h>
static void* add(void* value) { ++*static_cast<int*>(value); return nullptr; }
extern "C" int counted() {
  int value = dlsym(RTLD_DEFAULT, "malloc") ? 1 : 0;
  pthread_t thread;
  if (pthread_create(&thread, nullptr, add, &value) || pthread_join(thread, nullptr)) return -1;
  return value;
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="needs glibc on x86-64")
def test_what_moved_into_libc_is_called_by_its_older_name(tmp_path):
    source = tmp_path / "threaded.cpp"
    source.write_text(THREADED)
    units = [Unit(source, find_compiler(), ["-fPIC", "-O1"])]
    link = Link("libthreaded.so", find_compiler(), [])
    build(tmp_path / "plain", units, link)
    plain = older_systems.glibc_names(tmp_path / "plain" / link.library)
    if plain["pthread_create"] <= older_systems.OLDEST:
        pytest.skip(f"this glibc has pthread_create of {plain['pthread_create']}")
    needs = older_systems.build_for_older(tmp_path / "older", units, link)
    names = older_systems.glibc_names(tmp_path / "older" / link.library)
    assert {"pthread_create", "pthread_join", "dlsym"} <= set(names)
    assert max(names.values()) <= older_systems.OLDEST
    assert needs == ".".join(map(str, max(names.values())))
    assert ctypes.CDLL(tmp_path / "older" / link.library).counted() == 2


@pytest.mark.parametrize("part", ["cpu", "cuda"])
def test_the_libraries_of_this_checkout_need_no_newer_glibc(part):
    library = built.library_path(part)
    if not library.exists():
        pytest.skip(f"{library.name} is not built here")
    names = older_systems.glibc_names(library)
    newer = {name: version for name, version in names.items() if version > older_systems.OLDEST}
    assert newer == {}, f"make {'cuda' if part == 'cuda' else 'install'} builds it again"
