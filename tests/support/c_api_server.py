"""Serve a SavedModel by TensorFlow's C API: no Keras, no Python of TensorFlow.

A process that runs this file loads the shared libraries of the tensorflow wheel, by
ctypes, as a server written in C or Go would:

    python c_api_server.py LIBRARIES MODEL INPUT WIDTH OUTPUT[,OUTPUT...] ROWS FOUND
        [CALLERS [SECONDS]]

ROWS is a raw file of float32; FOUND gets the outputs, one after another. The same rows
are then asked for by 64 callers at the same time, each of whom must get the same: five
times, or for some seconds, in which memory must not grow by more than 5%.
"""

import ctypes
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CALLERS = 64
FLOAT = 1  # TF_FLOAT


class Port(ctypes.Structure):
    """TF_Output: an operation and the number of one of its tensors."""

    _fields_ = (("operation", ctypes.c_void_p), ("index", ctypes.c_int))


def declare(folder):
    """Return the C API with the types that ctypes must know."""
    for name in ("libtensorflow_framework.so.2", "libtensorflow_cc.so.2"):
        library = ctypes.CDLL(str(Path(folder) / name), mode=ctypes.RTLD_GLOBAL)
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    texts, size = ctypes.POINTER(ctypes.c_char_p), ctypes.c_size_t
    sizes = ctypes.POINTER(ctypes.c_int64)
    ports, pointers = ctypes.POINTER(Port), ctypes.POINTER(pointer)
    for name, result, *arguments in (
        ("TF_NewStatus", pointer),
        ("TF_DeleteStatus", None, pointer),
        ("TF_GetCode", number, pointer),
        ("TF_Message", text, pointer),
        ("TF_NewGraph", pointer),
        ("TF_NewSessionOptions", pointer),
        ("TF_GraphOperationByName", pointer, pointer, text),
        ("TF_AllocateTensor", pointer, number, sizes, number, size),
        ("TF_TensorData", pointer, pointer),
        ("TF_TensorByteSize", size, pointer),
        ("TF_DeleteTensor", None, pointer),
        (
            "TF_LoadSessionFromSavedModel",
            *(pointer, pointer, pointer, text, texts, number),
            *(pointer, pointer, pointer),
        ),
        (
            "TF_SessionRun",
            *(None, pointer, pointer, ports, pointers, number, ports, pointers),
            *(number, pointers, number, pointer, pointer),
        ),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Server:
    """A session of a SavedModel."""

    def __init__(self, library, model, inputs, outputs):
        self.c = library
        self.graph = library.TF_NewGraph()
        tags = (ctypes.c_char_p * 1)(b"serve")
        status = library.TF_NewStatus()
        options = library.TF_NewSessionOptions()
        self.session = library.TF_LoadSessionFromSavedModel(
            options, None, model.encode(), tags, 1, self.graph, None, status
        )
        self._check(status)
        self.inputs = (Port * 1)(self._port(inputs))
        self.outputs = (Port * len(outputs))(*map(self._port, outputs))

    def _check(self, status):
        failed = self.c.TF_GetCode(status)
        message = self.c.TF_Message(status).decode()
        self.c.TF_DeleteStatus(status)
        if failed:
            raise RuntimeError(message)

    def _port(self, name):
        operation, index = name.split(":")
        found = self.c.TF_GraphOperationByName(self.graph, operation.encode())
        if not found:
            raise RuntimeError(f"no operation {operation}")
        return Port(found, int(index))

    def run(self, rows, width):
        """Return the bytes of all outputs for the bytes of float32 rows."""
        shape = (ctypes.c_int64 * 2)(len(rows) // (4 * width), width)
        tensor = self.c.TF_AllocateTensor(FLOAT, shape, 2, len(rows))
        ctypes.memmove(self.c.TF_TensorData(tensor), rows, len(rows))
        count, status = len(self.outputs), self.c.TF_NewStatus()
        given = (ctypes.c_void_p * 1)(tensor)
        found = (ctypes.c_void_p * count)()
        self.c.TF_SessionRun(
            *(self.session, None, self.inputs, given, 1),
            *(self.outputs, found, count, None, 0, None, status),
        )
        self._check(status)
        self.c.TF_DeleteTensor(tensor)
        return b"".join(map(self._taken, found))

    def _taken(self, tensor):
        size = self.c.TF_TensorByteSize(tensor)
        taken = ctypes.string_at(self.c.TF_TensorData(tensor), size)
        self.c.TF_DeleteTensor(tensor)
        return taken


def resident():
    """Return the memory of this process, in pages."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def main(
    libraries, model, inputs, width, outputs, rows, found, callers=CALLERS, seconds=0
):
    """Answer once alone, then all callers; see the top of the file."""
    server = Server(declare(libraries), model, inputs, outputs.split(","))
    width, callers, rows = int(width), int(callers), Path(rows).read_bytes()
    alone = server.run(rows, width)
    Path(found).write_bytes(alone)
    # Each caller asks for other rows: 1 to 64 from another place on.
    step = 4 * width
    asked = [rows[i * step : (2 * i + 1) * step] for i in range(callers)]
    expected = [server.run(part, width) for part in asked]
    begun, rounds, memory = time.monotonic(), 0, []
    with ThreadPoolExecutor(callers) as pool:
        while rounds < 5 or time.monotonic() - begun < float(seconds):
            answers = list(pool.map(lambda part: server.run(part, width), asked))
            assert answers == expected  # to the last bit
            rounds += 1
            if time.monotonic() - begun > 0.3 * float(seconds):  # after a warm-up
                memory.append(resident())
    imported = {"tensorflow", "keras", "keras_moe", "numpy"} & sys.modules.keys()
    assert not imported, imported
    growth = memory[-1] / memory[0] - 1
    if float(seconds):
        assert growth <= 0.05, f"memory grew by {growth:.1%}"
        print(f"{callers} callers, {rounds * callers} requests, memory {growth:+.1%}")
    else:
        print(f"{callers} callers")


if __name__ == "__main__":
    main(*sys.argv[1:])
