"""acceptance.py rtx|tensorrt MODE input|constant: does a library build and run a plan on this GPU, does the plan compute what it
should, and how fast? One combination a process, so that a crash loses no other; prints JSON.

MODE is `here` (for the GPU that is current), `CURRENT`, or a compute capability such as `SM80`, which only TensorRT for RTX can
target. The network has the parts of a layer that matter: a linear layer, whose weight is an input or a constant; an in-place
KVCacheUpdate; and attention over the cache, once with lengths and once with an explicit mask of the keys that each query sees.
Keys and values past a sequence's end are junk, which must not change the result. Needs numpy and the library's Python
bindings."""

import ctypes
import importlib
import json
import math
import sys
import time
from pathlib import Path

import numpy

import cuda

BATCH, HEADS, HEAD_DIM, CAPACITY, INNER, OUTER = 2, 8, 128, 1024, 4096, 16384
LONGEST = 64
MODULES = {"rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"), "tensorrt": ("tensorrt", "tensorrt_bindings")}
LINES = []


def bindings(library):
    errors = []
    for name in MODULES[library]:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            errors.append(f"{name}: {error}")
    sys.exit("; ".join(errors))


def logger_of(trt):
    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, message):
            if severity <= trt.ILogger.Severity.WARNING:
                LINES.append(message[:400])

    return Logger()


def to_bf16(values):
    bits = numpy.ascontiguousarray(values, numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(numpy.uint16)


def to_f32(codes):
    return (codes.astype(numpy.uint32) << 16).view(numpy.float32)


def network(trt, builder, weight, attends):
    flags = trt.NetworkDefinitionCreationFlag
    strongly_typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    net = builder.create_network(strongly_typed)
    bf16, i32 = trt.bfloat16, trt.int32
    x = net.add_input("x", bf16, (-1, INNER))
    if weight is None:
        w = net.add_input("w", bf16, (OUTER, INNER))
    else:
        w = net.add_constant((OUTER, INNER), trt.Weights(bf16, weight.ctypes.data, weight.size)).get_output(0)
    y = net.add_matrix_multiply(x, trt.MatrixOperation.NONE, w, trt.MatrixOperation.TRANSPOSE).get_output(0)
    q, k, v = (net.add_input(name, bf16, (-1, HEADS, -1, HEAD_DIM)) for name in "qkv")
    keys, values = (net.add_input(name, bf16, (-1, HEADS, CAPACITY, HEAD_DIM)) for name in ("keys", "values"))
    past = net.add_input("past", i32, (-1,))
    new_keys = net.add_kv_cache_update(keys, k, past, trt.KVCacheMode.LINEAR).get_output(0)
    new_values = net.add_kv_cache_update(values, v, past, trt.KVCacheMode.LINEAR).get_output(0)
    causal = trt.CausalMaskKind.LOWER_RIGHT if attends == "lengths" else trt.CausalMaskKind.NONE
    attention = net.add_attention_v2(q, new_keys, new_values, trt.AttentionNormalizationOp.SOFTMAX, causal)
    if attends == "lengths":
        attention.key_value_lengths = net.add_input("total", i32, (-1,))
    else:
        attention.mask = net.add_input("mask", trt.bool, (-1, 1, -1, CAPACITY))
    for tensor, name in ((y, "y"), (new_keys, "new_keys"), (new_values, "new_values"), (attention.get_output(0), "out")):
        tensor.name = name
        net.mark_output(tensor)
    return net


def build(trt, logger, mode, weight, attends):
    LINES.clear()
    builder = trt.Builder(logger)
    net = network(trt, builder, weight, attends)
    config = builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if mode != "here":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, mode), 0)
    profile = builder.create_optimization_profile()
    head, cache = (HEADS, 1, HEAD_DIM), (HEADS, CAPACITY, HEAD_DIM)
    profile.set_shape("x", (1, INNER), (1, INNER), (BATCH * LONGEST, INNER))
    for name in "qkv":
        profile.set_shape(name, (1, *head), (1, *head), (BATCH, HEADS, LONGEST, HEAD_DIM))
    for name in ("keys", "values"):
        profile.set_shape(name, (1, *cache), (1, *cache), (BATCH, *cache))
    profile.set_shape("past", (1,), (1,), (BATCH,))
    if attends == "lengths":
        profile.set_shape("total", (1,), (1,), (BATCH,))
    else:
        profile.set_shape("mask", (1, 1, 1, CAPACITY), (1, 1, 1, CAPACITY), (BATCH, 1, LONGEST, CAPACITY))
    config.add_optimization_profile(profile)
    start = time.perf_counter()
    plan = builder.build_serialized_network(net, config)
    seconds = round(time.perf_counter() - start, 2)
    return plan, {"built": plan is not None, "seconds": seconds, "log": LINES[-6:]}


def expected_of(arrays, past, total):
    """The product, the caches and the attention in FP32."""
    f = {name: to_f32(codes) for name, codes in arrays.items()}
    tokens = f["q"].shape[2]
    caches = {name: arrays[name].copy() for name in ("keys", "values")}
    out = numpy.empty_like(f["q"])
    for b in range(BATCH):
        n = int(total[b])
        caches["keys"][b, :, past[b] : n] = arrays["k"][b]
        caches["values"][b, :, past[b] : n] = arrays["v"][b]
        keys, values = (to_f32(caches[name][b, :, :n]) for name in ("keys", "values"))
        scores = f["q"][b] @ keys.transpose(0, 2, 1)
        scores = numpy.where(numpy.tri(tokens, n, n - tokens, dtype=bool), scores, -numpy.inf)
        weights = numpy.exp(scores - scores.max(-1, keepdims=True))
        out[b] = weights / weights.sum(-1, keepdims=True) @ values
    return f["x"] @ f["w"].T, caches, out


def relative(found, expected):
    return float(numpy.linalg.norm(found - expected) / numpy.linalg.norm(expected))


def run_once(trt, engine, gpu, weight, attends, tokens, random):
    LINES.clear()
    context = engine.create_execution_context()
    if context is None:
        return {"context": False, "log": LINES[-6:]}
    past = numpy.array([100, 37], numpy.int32)
    total = (past + tokens).astype(numpy.int32)
    normal = lambda *shape: to_bf16(random.standard_normal(shape, numpy.float32) * 0.5)
    arrays = {"x": normal(BATCH * tokens, INNER), "w": weight}
    arrays |= {name: normal(BATCH, HEADS, tokens, HEAD_DIM) for name in "qkv"}
    arrays["q"] = to_bf16(to_f32(arrays["q"]) / math.sqrt(HEAD_DIM))
    arrays |= {name: normal(BATCH, HEADS, CAPACITY, HEAD_DIM) for name in ("keys", "values")}
    # What lies past a sequence's end is loud, so that a kernel that reads it is noticed.
    for name in ("keys", "values"):
        for b in range(BATCH):
            arrays[name][b, :, total[b] :] = to_bf16(numpy.float32(30.0))
    product, caches, attended = expected_of(arrays, past, total)
    query = numpy.arange(tokens)[None, None, :, None]
    mask = numpy.arange(CAPACITY)[None, None, None, :] <= query + past[:, None, None, None]
    host = {**arrays, "past": past, "total": total, "mask": mask.astype(numpy.uint8)}
    junk = numpy.uint16(0xFFFF)  # NaN
    host |= {"y": numpy.full((BATCH * tokens, OUTER), junk), "out": numpy.full_like(arrays["q"], junk)}
    memory = {name: gpu.upload(array.tobytes()) for name, array in host.items()}
    memory |= {"new_keys": memory["keys"], "new_values": memory["values"]}
    enqueued = True
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            enqueued &= bool(context.set_input_shape(name, tuple(host[name].shape)))
        enqueued &= bool(context.set_tensor_address(name, memory[name]))
    start = time.perf_counter()
    enqueued &= bool(context.execute_async_v3(gpu.stream))
    gpu.wait()
    first = time.perf_counter() - start
    read = lambda name, like: numpy.frombuffer(gpu.download(memory[name], like.nbytes), like.dtype).reshape(like.shape)
    y, out = to_f32(read("y", host["y"])), to_f32(read("out", host["out"]))
    exact = all((read(name, caches[name]) == caches[name]).all() for name in ("keys", "values"))
    for _ in range(20):
        context.execute_async_v3(gpu.stream)
    gpu.wait()
    start = time.perf_counter()
    for _ in range(100):
        context.execute_async_v3(gpu.stream)
    gpu.wait()
    answer = {
        "enqueued": enqueued,
        "first_run_seconds": round(first, 3),
        "microseconds_per_run": round((time.perf_counter() - start) * 1e4, 1),
        "product_relative_error": relative(y, product),
        "attention_relative_error": relative(out, attended),
        "cache_is_exact": bool(exact),
        "log": LINES[-4:],
    }
    answer["good"] = bool(
        enqueued and exact and answer["product_relative_error"] < 0.01 and answer["attention_relative_error"] < 0.01
    )
    for name in host:
        gpu.free(memory[name])
    return answer


def main():
    library, mode, kind = sys.argv[1:4]
    # Its folder, where the wheels' modules do not look for themselves.
    for file in sorted(Path(__file__).parent.glob("tensorrt*/lib*onnxparser*.so*")):
        try:
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            LINES.append(str(error))
    trt = bindings(library)
    driver = cuda.Driver()
    chosen = cuda.chosen(driver)
    gpu = cuda.Gpu(driver, chosen["index"])
    random = numpy.random.default_rng(1)
    weight = to_bf16(random.standard_normal((OUTER, INNER), numpy.float32) * 0.02)
    logger = logger_of(trt)
    answer = {"library": f"{trt.__name__} {trt.__version__}", "gpu": chosen["name"], "mode": mode, "weight": kind}
    for attends in ("mask", "lengths"):
        try:
            plan, found = build(trt, logger, mode, weight if kind == "constant" else None, attends)
            if plan is not None:
                engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
                found["deserialized"] = engine is not None
                if engine is None:
                    found["log"] = LINES[-6:]
                for tokens in (1, LONGEST) if engine is not None else ():
                    found[f"tokens_{tokens}"] = run_once(trt, engine, gpu, weight, attends, tokens, random)
            answer[attends] = found
        except Exception as error:  # the message is the answer
            answer[attends] = {"exception": repr(error)[:400], "log": LINES[-6:]}
        # Kept even if the next part crashes.
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
