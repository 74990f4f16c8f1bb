"""Stand-ins for NVIDIA's driver and compiler that do as they are told."""

from typing import Any

from dcomp.kernels.build_cache import BuildError
from dcomp.kernels.cuda.compile import Target

TEXTS = {
    100: b"no CUDA-capable device is detected",
    209: b"no kernel image is available",
    222: b"unsupported toolchain",
}


def _target(argument: Any) -> Any:
    """Return the variable that was passed by `byref`."""
    return argument._obj


class FakeDriver:
    """A driver with devices of some kind, which loads what it is told to and notes what it was asked.

    Attributes:
        refusals: what loading code that starts with some bytes gives, instead of success.
        loaded: the code of all modules.
        launches: name, grid and arguments of each launch, with the context that was current.
    """

    def __init__(self, capability: tuple[int, int] = (8, 6), cuda: int = 13000, devices: int = 1) -> None:
        self.capability, self.cuda, self.devices = capability, cuda, devices
        self.refusals: dict[bytes, int] = {}
        self.loaded: list[bytes] = []
        self.launches: list[tuple[Any, ...]] = []
        self.attributes: list[tuple[int, int]] = []
        self.contexts: list[int | None] = [None]
        self._names: list[str] = []

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        _target(version).value = self.cuda
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        _target(count).value = self.devices
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        _target(device).value = ordinal
        return 0 if ordinal < self.devices else 101

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        name.value = f"Fake {device.value}".encode()[:length]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        _target(value).value = {16: 4, 75: self.capability[0], 76: self.capability[1]}[attribute]
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        _target(context).value = 1000 + device.value
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802
        _target(context).value = self.contexts.pop()
        return 0

    def cuModuleLoadData(self, module: Any, code: bytes) -> int:  # noqa: N802
        refusal = next((code_ for start, code_ in self.refusals.items() if code.startswith(start)), 0)
        if not refusal:
            self.loaded.append(code)
            _target(module).value = len(self.loaded)
        return refusal

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:  # noqa: N802
        self._names.append(name.decode())
        _target(function).value = len(self._names)
        return 0

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> int:  # noqa: N802
        self.attributes.append((attribute, value))
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:  # noqa: N802
        self.launches.append((self._names[function.value - 1], rest[:3], rest[3:6], rest[6], self.contexts[-1]))
        return self.refusals.get(b"launch", 0)

    def cuGetErrorString(self, code: int, text: Any) -> int:  # noqa: N802
        _target(text).value = TEXTS.get(code)
        return 0


class FakeNvrtc:
    """A compiler whose code is its name and the architecture; it counts how often it is asked."""

    name, version = "fake", (13, 0)

    def __init__(self, newest: tuple[int, int] = (12, 0), problem: str | None = None) -> None:
        self.newest, self.problem, self.compiled = newest, problem, 0

    def architecture(self, target: Target) -> str:
        """Return `sm_XX` of devices of a generation that it knows, `compute_XX` for PTX."""
        if target.isa is None and target.capability[0] > self.newest[0]:
            raise BuildError("it knows no such device")
        return "{}_{}{}".format("compute" if target.isa else "sm", *min(target.capability, self.newest))

    def compile(self, program: bytes, architecture: str, isa: tuple[int, int] | None) -> bytes:
        """Return a text that names its target."""
        self.compiled += 1
        if self.problem:
            raise BuildError(self.problem)
        return f"{architecture} {isa} {len(program)}".encode()
