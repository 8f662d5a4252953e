"""Find out without torch if this machine has an NVIDIA GPU."""

import ctypes


def gpu_is_present() -> bool:
    """Whether NVIDIA's driver (libcuda.so.1) is installed and counts a device.

    The driver itself is asked, because it would run the kernels: /dev/nvidia0 is missing under WSL, and nvidia-smi in
    many containers. A GPU that CUDA_VISIBLE_DEVICES hides does not count.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
