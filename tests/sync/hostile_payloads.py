"""Pickles that must not be carried out, and a process that gives them to the reader and watches what happens.

Run with "corpus", or "fuzz" with a seed and a number: it reads every payload under an audit hook, which sees imports,
calls of `exec`, opened files, sockets and processes, and under tracemalloc, and writes one line of JSON.
"""

import json
import pickle
import random
import struct
import sys
import tracemalloc

EXPLOITS = """os.system posix.system nt.system os.popen os.execv os.spawnl os.remove os.rename os.putenv os.kill
subprocess.Popen subprocess.call subprocess.check_output builtins.eval builtins.exec builtins.compile
builtins.__import__ builtins.getattr builtins.setattr builtins.open builtins.apply builtins.map builtins.breakpoint
__builtin__.eval importlib.import_module runpy.run_path runpy._run_code code.InteractiveInterpreter pty.spawn
platform.popen timeit.timeit cProfile.run profile.run pdb.run bdb.Bdb doctest.debug_script trace.Trace
asyncio.subprocess.create_subprocess_shell webbrowser.open socket.socket urllib.request.urlopen
http.client.HTTPConnection requests.get smtplib.SMTP ftplib.FTP shutil.rmtree tempfile.mkdtemp pathlib.Path
io.open io.FileIO mmap.mmap
ctypes.CDLL ctypes.cdll.LoadLibrary _ctypes.dlopen cffi.FFI numpy.load numpy.testing._private.utils.runstring
numpy.fromfile torch.load torch.jit.load torch.hub.load torch.serialization.load torch.storage._load_from_bytes
torch._utils._rebuild_tensor_v2 torch._utils._rebuild_parameter torch.utils._config_module.ConfigModule.load_config
torch.distributed.rpc.rpc_sync torch.ops.load_library torch.classes.load_library torch.utils.cpp_extension.load
torch.multiprocessing.reductions.rebuild_event torch.multiprocessing.reductions.rebuild_meta_tensor
torch.multiprocessing.reductions.rebuild_nested_tensor torch.multiprocessing.reductions.storage_from_cache
torch.device torch.tensor torch.empty torch.from_file torch.UntypedStorage.from_file torch.nn.Module
torch.fx.graph_module.reduce_graph_module torch._dynamo.guards.GuardBuilder.get torch._inductor.codecache.compile_file
transformers.AutoModel.from_pretrained pickle.loads _pickle.loads marshal.loads dill.loads cloudpickle.loads joblib.load
shelve.open copyreg._reconstructor copyreg.add_extension copyreg.__newobj__ collections.OrderedDict
collections.defaultdict functools.partial operator.attrgetter operator.methodcaller operator.itemgetter
types.FunctionType types.CodeType types.MethodType weakref.ref threading.Thread multiprocessing.Process
multiprocessing.reduction.rebuild_connection multiprocessing.managers.RebuildProxy multiprocessing.util.Finalize
multiprocessing.resource_sharer._resource_sharer concurrent.futures.ProcessPoolExecutor logging.config.dictConfig
logging.config.listen sys.exit sys.settrace sys.modules gc.get_objects signal.signal atexit.register faulthandler.dump
site.main venv.create ensurepip.bootstrap pip.main setuptools.setup distutils.spawn.spawn idlelib.rpc.SocketIO
rollout.Engine weight_sync.foreign.payload.read_serialized_named_tensors weight_sync.transports.disk.read_checkpoint
sglang.srt.utils.SafeUnpickler vllm.LLM""".split()


def text(value):
    raw = value.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


def name_of(module, name):
    return text(module) + text(name) + b"\x93"


def exploits():
    """Every dangerous name, in each form in which a pickle may call one."""
    for dotted in EXPLOITS:
        module, _, name = dotted.rpartition(".")
        line = f"c{module}\n{name}\n".encode()
        tail = text("echo no")
        yield f"{dotted} by text", line + b"(S'echo no'\ntR."
        yield f"{dotted} of protocol 2", b"\x80\x02" + line + b"X\x07\x00\x00\x00echo no\x85R."
        yield f"{dotted} of protocol 4", b"\x80\x04" + name_of(module, name) + tail + b"\x85R."
        yield (
            f"{dotted} from the memo",
            b"\x80\x04" + text(module) + b"\x94" + text(name) + b"\x94h\x00h\x01\x93)R.",
        )
        yield f"{dotted} as a new object", b"\x80\x04" + name_of(module, name) + b")\x81}b."
        yield f"{dotted} as an instance", f"(S'x'\ni{module}\n{name}\n.".encode()
        yield (
            f"{dotted} in a tensor",
            b"\x80\x04]" + text("w") + name_of(module, name) + b")R\x86a.",
        )
        yield (
            f"{dotted} as an argument",
            b"\x80\x04" + rebuild("rebuild_tensor") + name_of(module, name) + b")R\x85R.",
        )


def rebuild(name):
    return name_of("torch.multiprocessing.reductions", name)


def opcodes():
    """Opcodes that no tensor needs: registries, persistent ids, and those that take as much memory as they say."""
    for opcode in range(256):
        yield f"opcode {opcode:#x} alone", bytes([0x80, 4, opcode]) + b"."
        yield (
            f"opcode {opcode:#x} on values",
            b"\x80\x04](NK\x01" + bytes([opcode]) + b"\x01\x00\x00\x00.",
        )
    for index in (1, 200, 0x7FFFFFFF):
        yield f"extension {index}", b"\x80\x02\x84" + struct.pack("<i", index) + b")R."
    yield "a persistent id", b"\x80\x04" + text("storage") + b"Q."
    yield "a persistent id as text", b"Pstorage\n."
    big = 2**60
    for what, opcode, size in [
        ("text", b"X", struct.pack("<I", 2**32 - 1)),
        ("long text", b"\x8d", struct.pack("<Q", big)),
        ("bytes", b"B", struct.pack("<I", 2**32 - 1)),
        ("long bytes", b"\x8e", struct.pack("<Q", big)),
        ("a byte array", b"\x96", struct.pack("<Q", big)),
        ("a frame", b"\x95", struct.pack("<Q", big)),
        ("an integer", b"\x8a", b"\xff"),
        ("a long integer", b"\x8b", struct.pack("<i", 2**31 - 1)),
        ("a negative integer's size", b"\x8b", struct.pack("<i", -1)),
        ("a place in the memo", b"Nr", struct.pack("<I", 2**32 - 1)),
        ("a reference", b"j", struct.pack("<I", 2**32 - 1)),
    ]:
        yield f"{what} of a false size", b"\x80\x04" + opcode + size
        yield f"{what} of a false size in a list", b"\x80\x04](" + opcode + size + b"e."
    yield "digits of an integer as text", b"I" + b"9" * 100_000 + b"\n."
    yield "digits of a long as text", b"L" + b"9" * 100_000 + b"L\n."
    for version in (6, 7, 255):
        yield f"protocol {version}", bytes([0x80, version]) + b"]."


def bombs():
    """Small payloads that would be large, deep or endless values."""
    for depth in (20, 1_000, 100_000):
        yield f"{depth} lists in each other", b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b"."
        yield f"{depth} tuples in each other", b"\x80\x04)" + b"\x85" * depth + b"."
        yield f"{depth} marks", b"\x80\x04" + b"(" * depth + b"."
        yield f"{depth} values", b"\x80\x04" + b"N" * depth + b"."
        yield f"{depth} lists", b"\x80\x04" + b"]" * depth + b"."
        yield f"{depth} mappings", b"\x80\x04(" + b"}" * depth + b"t."
        yield (
            f"{depth} calls of a size",
            b"\x80\x04" + name_of("torch", "Size") * depth + b")R" * depth,
        )
        yield f"{depth} in the memo", b"\x80\x04]" + b"\x94" * depth + b"."
    laughs = b"\x80\x04" + text("lol") + b"\x94"
    for level in range(30):
        laughs += b"(" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 9 + b"t\x94"
    yield "a billion laughs in tuples", laughs + b"."
    laughs = b"\x80\x04" + text("lol") + b"\x94"
    for level in range(12):
        laughs += b"](" + (b"h" + bytes([level])) * 10 + b"e\x94"
    yield "a billion laughs in lists", laughs + b"."
    pair = b"\x80\x04]\x94" + text("w") + b"N\x86\x940"
    yield "one pair many times", pair[:-1] + b"(" + b"h\x01" * 10_000 + b"e."
    yield "more names than there may be", b"\x80\x04]" + (b"(" + b"N" * 1000 + b"e") * 70 + b"."
    yield "a list in itself", b"\x80\x04]\x94h\x00a."
    yield "a list in its own tuple", b"\x80\x04]\x94h\x00\x85\x94h\x00h\x01a."
    yield "a list that grows after it was used", b"\x80\x04]\x94]h\x00ah\x00Na."
    yield "a mapping in itself", b"\x80\x04}\x94" + text("a") + b"h\x00s."
    yield (
        "an instance that is its own state",
        (
            b"\x80\x04"
            + name_of("m", "LocalSerializedTensor")
            + b")\x81\x94}"
            + text("values")
            + b"h\x00sb."
        ),
    )
    yield (
        "a state given twice",
        (b"\x80\x04" + name_of("m", "LocalSerializedTensor") + b")\x81}b}b."),
    )
    yield "a function with a state", b"\x80\x04" + rebuild("rebuild_tensor") + b"}b."
    yield "a class called", b"\x80\x04" + name_of("m", "LocalSerializedTensor") + b")R."
    yield "a dtype called", b"\x80\x04" + name_of("torch", "float32") + b")R."
    yield "a tensor's class called", b"\x80\x04" + name_of("torch", "Tensor") + b"K\x7f\x85R."
    yield "a call of text", b"\x80\x04" + text("os.system") + text("id") + b"\x85R."
    yield "a call of a call", b"\x80\x04" + name_of("torch", "Size") + b")R)R."
    yield "a name of numbers", b"\x80\x04K\x01K\x02\x93."
    yield "a dotted name", b"\x80\x04" + name_of("torch", "Size.__class__.__subclasses__") + b")R."
    yield "a name behind a mark", b"\x80\x04" + text("torch") + b"(" + text("Size") + b"\x93."


class Called:
    """Pickled as a call of what is found under `name`, which only has to be there while it is written."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def storage(name=b"/torch_1_1_1", size=64, manager=b"/tmp/manager.sock"):
    from torch import UntypedStorage
    from torch.multiprocessing import reductions

    return Called(reductions.rebuild_storage_filename, UntypedStorage, manager, name, size)


def tensor(shape=(4,), stride=(1,), offset=0, dtype=None, kept=None, kind=None):
    import torch
    from torch.multiprocessing import reductions

    typed = Called(reductions.rebuild_typed_storage, kept or storage(), dtype or torch.float32)
    place = (offset, shape, stride, False)
    return Called(reductions.rebuild_tensor, kind or torch.Tensor, typed, place)


def on_gpu(**other):
    import torch
    from torch.multiprocessing import reductions

    fields = {
        "kind": torch.Tensor,
        "size": torch.Size([4]),
        "stride": (1,),
        "offset": 0,
        "storage": torch.storage.TypedStorage,
        "dtype": torch.float32,
        "device": 0,
        "handle": b"\x02c" + bytes(64),
        "bytes": 64,
        "at": 0,
        "grad": False,
        "counters": b"/torch_1_1_1",
        "counter": 1,
        "event": b"",
        "wait": False,
    }
    return Called(reductions.rebuild_cuda_tensor, *{**fields, **other}.values())


def lies():
    """Well-formed payloads whose tensors cannot be."""
    import torch

    huge = 2**62
    for what, value in {
        "a negative size": tensor(shape=(-4,)),
        "a huge size": tensor(shape=(huge,)),
        "sizes whose product is huge": tensor(shape=(2**20,) * 4, stride=(0,) * 4),
        "a size that is true": tensor(shape=(True,)),
        "a size that is text": tensor(shape=("4",)),
        "many dimensions": tensor(shape=(1,) * 100, stride=(1,) * 100),
        "a negative stride": tensor(stride=(-1,)),
        "a huge stride": tensor(shape=(2,), stride=(huge,)),
        "another number of strides": tensor(stride=(1, 1)),
        "no strides": tensor(stride=None),
        "a negative offset": tensor(offset=-1),
        "an offset behind the end": tensor(offset=13),
        "a huge offset": tensor(offset=huge),
        "more bytes than the storage": tensor(shape=(17,)),
        "the same bytes many times": tensor(shape=(17,), stride=(0,)),
        "a class as dtype": tensor(dtype=torch.Tensor),
        "text as dtype": tensor(dtype="float32"),
        "a dtype that does not travel": tensor(dtype=torch.qint8),
        "another class of tensor": tensor(kind=torch.float32),
        "a storage without a call": tensor(kept=torch.Size([1])),
        "a tensor as storage": tensor(kept=tensor()),
        "a storage of negative bytes": tensor(kept=storage(size=-1)),
        "a storage of huge bytes": tensor(kept=storage(size=huge)),
        "a handle of no bytes on a GPU": on_gpu(handle=b""),
        "a handle of few bytes on a GPU": on_gpu(handle=b"x" * 63),
        "a handle of expandable memory": on_gpu(handle=b"\x02e" + bytes(64)),
        "a handle of text": on_gpu(handle="x" * 64),
        "a GPU below 0": on_gpu(device=-1),
        "a GPU of another name": on_gpu(device="GPU-../../etc"),
        "a counter below 0": on_gpu(counter=-1),
        "a counter behind the end": on_gpu(counter=10_000),
        "counters in another file": on_gpu(counters=b"/../etc/passwd"),
        "an event of few bytes": on_gpu(event=b"x", wait=True),
        "an allocation below 0": on_gpu(at=-8),
        "more of a GPU than the storage": on_gpu(size=torch.Size([17])),
        "no call at all": None,
        "a number": 7,
        "text": "weights",
        "bytes": b"weights",
        "a list": [],
    }.items():
        yield what, pickle.dumps([("w", value)], protocol=4)
    for path in (
        *(b"", b"/", b"torch_1_1", b"/torch_1", b"/torch_1_1/../../etc/passwd", b"/../etc/passwd"),
        *(b"/dev/zero", b"//torch_1_1", b"/torch_1_1\0", b"/torch_1_1\n", b"/torch_a_1", b"/sem.x"),
        *(b"/torch_" + b"1" * 200 + b"_1", "/torch_1_1", 7, None),
    ):
        kept = storage(name=path)
        yield f"a file called {path!r:.40}", pickle.dumps([("w", tensor(kept=kept))], protocol=4)


def shapes():
    """Payloads of the wrong shape around a tensor that could be."""
    good = tensor()
    entry = {
        "name": "w",
        "shape": (4,),
        "dtype": "float32",
        "start_idx": 0,
        "end_idx": 16,
        "numel": 16,
    }
    for what, value in {
        "a tensor alone": good,
        "a pair without its list": ("w", good),
        "a name alone": [("w",)],
        "three in a pair": [("w", good, good)],
        "a pair as text": ["wt"],
        "a name of bytes": [(b"w", good)],
        "a long name": [("w" * 600, good)],
        "a mapping": {"w": good},
        "a bucket without metadata": {"flattened_tensor": good},
        "a bucket with more": {"flattened_tensor": good, "metadata": [], "code": "x"},
        "a bucket of text": {"flattened_tensor": "x", "metadata": []},
        "metadata of numbers": {"flattened_tensor": good, "metadata": [1, 2]},
        "metadata that are a mapping": {"flattened_tensor": good, "metadata": {}},
        "an entry without its place": {"flattened_tensor": good, "metadata": [{"name": "w"}]},
        "an entry below 0": {"flattened_tensor": good, "metadata": [{**entry, "start_idx": -1}]},
        "an entry of a huge place": {"flattened_tensor": good, "metadata": [{**entry, "end_idx": 2**62}]},
        "an entry with a float": {"flattened_tensor": good, "metadata": [{**entry, "numel": 1.5, "end_idx": 1.5}]},
        "floats": [1.5],
        "nothing": None,
        "a set": {1, 2},
    }.items():  # fmt: skip
        yield what, pickle.dumps(value, protocol=4)


def cut(named):
    """Everything that begins like a good payload and ends too early, or goes on."""
    for end in range(len(named)):
        yield f"cut after {end} bytes", named[:end]
    for more in (b".", b"N", b"\0" * 10, named):
        yield f"followed by {len(more)} bytes", named + more


def others():
    """What is no pickle at all."""
    yield "nothing", b""
    yield "a zip", b"PK\x03\x04" + bytes(100)
    yield "gzip", b"\x1f\x8b\x08" + bytes(100)
    yield "an array of numpy", b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}"
    yield "safetensors", struct.pack("<Q", 2) + b"{}"
    yield "JSON", '[{"w": 1}]'
    yield "text that is no base64", "!" * 40
    yield "base64 of nothing", ""
    yield "text that is not ASCII", "é" * 40
    yield "a number", 7
    yield "a list of lists", [[]]
    generator = random.Random(0)
    for number in range(100):
        yield f"noise {number}", bytes([0x80]) + generator.randbytes(generator.randrange(400))


def good():
    """Payloads that are as they should be, except that there is no such shared memory."""
    import torch
    from foreign_sender import FlattenedTensorMetadata, LocalSerializedTensor

    empty = torch.empty(0)
    entries = [FlattenedTensorMetadata("w", torch.Size([4]), torch.float32, 0, 16, 16)]
    part = pickle.dumps(tensor(), protocol=4)
    return [
        pickle.dumps([("w", tensor()), ("v", tensor(torch.Size([2, 2]), (2, 1)))], protocol=4),
        pickle.dumps({"flattened_tensor": tensor(), "metadata": entries}, protocol=4),
        pickle.dumps([("w", LocalSerializedTensor([part, part]))], protocol=4),
        pickle.dumps([("w", on_gpu())], protocol=5),
        pickle.dumps([("w", tensor((0,), (1,)))], protocol=3),
        bytes(forked([("e", empty)])),
    ]


def forked(value):
    from multiprocessing.reduction import ForkingPickler

    return ForkingPickler.dumps(value)


def corpus():
    """(what it is, payload) of all families."""
    yield from exploits()
    yield from opcodes()
    yield from bombs()
    yield from lies()
    yield from shapes()
    yield from cut(good()[0])
    yield from others()


def mutations(seed, count):
    """Good payloads with a few bytes changed, or pieces of them cut, doubled, or put into each other."""
    generator = random.Random(seed)
    seeds = good()
    pieces = [payload for _, payload in (*exploits(), *bombs()) if isinstance(payload, bytes)]
    for number in range(count):
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.randrange(1, 6)):
            at = generator.randrange(len(data) + 1)
            to = min(len(data), at + generator.randrange(1, 24))
            match generator.randrange(6):
                case 0 if at < len(data):
                    data[at] = generator.randrange(256)
                case 1:
                    data[at:at] = generator.randbytes(generator.randrange(1, 8))
                case 2:
                    del data[at:to]
                case 3:
                    data[at:at] = data[at:to]
                case 4:
                    data[at:at] = generator.choice(pieces)[2:60]
                case _:
                    other = generator.choice(seeds)
                    start = generator.randrange(len(other))
                    data[at:to] = other[start : start + 24]
        yield f"mutation {number}", bytes(data)


def control():
    """Harmless pickles that do something."""
    yield "a listing", b"\x80\x04" + name_of("os", "listdir") + text("/") + b"\x85R."
    yield "much memory", b"\x80\x04" + name_of("builtins", "bytes") + b"J\x00\x00\x00\x04\x85R."
    yield "an exception", b"\x80\x04" + name_of("operator", "truediv") + b"K\x01K\x00\x86R."


def carried_out(payload):
    pickle.loads(payload)
    return []


class Watch:
    """What the process did while a payload was read."""

    #: A file of shared memory that is not there is looked for, and a driver where a GPU's memory is named.
    HARMLESS = ("open /dev/shm/torch_", "ctypes.dlopen libcuda.so.1")

    def __init__(self):
        self.on = False
        self.events = []
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if not self.on:
            return
        what = f"{event} {str(arguments[0])[:80] if arguments else ''}"
        if not what.startswith(self.HARMLESS):
            self.events.append(what)


def main(kind, *options):
    """Read all payloads of a kind; print what went wrong, and how many there were."""
    import torch

    from weight_sync import read_serialized_named_tensors
    from weight_sync.errors import ManifestMismatch, PayloadRefused, TransportError

    read_payload = read_serialized_named_tensors
    match kind:
        case "corpus":
            payloads = list(corpus())
        case "fuzz":
            payloads = mutations(*map(int, options))
        case "control":  # what this looks like when it is carried out
            payloads, read_payload = list(control()), carried_out
    for warm in good():  # what is imported when it is first used
        try:
            read_serialized_named_tensors(warm)
        except (PayloadRefused, TransportError):
            pass
    torch.cuda.device_count()
    watch = Watch()
    wrong, errors, most = [], {}, 0
    count = read = 0
    if kind != "fuzz":  # it slows everything down
        tracemalloc.start()
    for what, payload in payloads:
        count += 1
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        watch.on = True
        try:
            named = read_payload(payload)
            result = "read"
            read += 1
            if any(tensor.numel() for _, tensor in named):
                wrong.append(f"{what}: got {named} of nowhere")
        except (PayloadRefused, TransportError, ManifestMismatch) as error:
            result = type(error).__name__
            if len(str(error)) > 2_000:
                wrong.append(f"{what}: an error of {len(str(error))} characters")
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"[:200]
            wrong.append(f"{what}: {result}")
        watch.on = False
        peak = tracemalloc.get_traced_memory()[1] - before
        size = len(payload) if isinstance(payload, (bytes, str)) else 0
        most = max(most, peak)
        if peak > (1 << 20) + 128 * size:
            wrong.append(f"{what}: {peak} bytes of memory for {size}")
        wrong += [f"{what}: {event}" for event in watch.events]
        watch.events.clear()
        errors[result] = errors.get(result, 0) + 1
    print(
        json.dumps(
            {
                "count": count,
                "read": read,
                "wrong": wrong[:40],
                "errors": errors,
                "most_bytes": most,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
