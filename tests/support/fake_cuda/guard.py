"""The C++ side of a CUDA device that does nothing; to be loaded before torch is imported."""

import ctypes
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

NUM_GPUS = 8
COMPILER = "g++"

SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;

namespace at {
struct HooksOfNothing : CUDAHooksInterface {
  explicit HooksOfNothing(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return NUM_GPUS; }
  int getNumGPUs() const override { return NUM_GPUS; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { current = index; }
  static inline DeviceIndex current = 0;
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, HooksOfNothing)
}

namespace {
struct GuardOfNothing : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device device() { return Device(DeviceType::CUDA, at::HooksOfNothing::current); }
  static Stream stream(Device d) { return Stream(Stream::DEFAULT, d.has_index() ? d : device()); }
  Device getDevice() const override { return device(); }
  Device exchangeDevice(Device to) const override {
    Device from = device();
    at::HooksOfNothing::current = to.index();
    return from;
  }
  void setDevice(Device to) const override { at::HooksOfNothing::current = to.index(); }
  void uncheckedSetDevice(Device to) const noexcept override { at::HooksOfNothing::current = to.index(); }
  DeviceIndex deviceCount() const noexcept override { return NUM_GPUS; }
  Stream getStream(Device d) const noexcept override { return stream(d); }
  Stream getNewStream(Device d, int) const override { return stream(d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, GuardOfNothing);
}

extern "C" void set_current_device(int index) { at::HooksOfNothing::current = static_cast<DeviceIndex>(index); }
extern "C" int current_device() { return at::HooksOfNothing::current; }
"""


def missing() -> str | None:
    """Say what this machine lacks for a guard; None if nothing."""
    if sys.platform != "linux":
        return "fake CUDA is tried on Linux only"
    return None if shutil.which(COMPILER) else f"fake CUDA needs {COMPILER}"


def load(folder: Path) -> ctypes.CDLL:
    """Compile the guard into a folder and load it."""
    assert "torch" not in sys.modules, "the guard must be there before torch is"
    torch = Path(sysconfig.get_path("purelib")) / "torch"
    library = folder / "guard.so"
    command = [COMPILER, "-O0", "-std=c++20", "-shared", "-fPIC", f"-DNUM_GPUS={NUM_GPUS}", "-x", "c++", "-"]
    command += [f"-I{torch}/include", f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    subprocess.run([*command, "-o", str(library)], input=SOURCE.encode(), check=True)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
