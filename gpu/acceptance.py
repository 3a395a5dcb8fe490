"""Checks which plans TensorRT for RTX builds and runs on this GPU, whether they compute correct results, and how fast: for
the GPU in the machine (`CURRENT`, and no target) and for SM 8.0, 8.9 and 12.0. Prints one JSON object.

The network has the critical parts of a layer: a linear layer, an in-place KVCacheUpdate, and attention over the cache. The
linear layer is built once with its weight as an input and once as a constant, to measure the cost of inputs. Needs torch
with CUDA, and the Python bindings and the library that pack.sh packs."""

import json
import math
import time

import torch

try:
    import tensorrt_rtx as trt
except ImportError:
    import tensorrt_rtx_bindings as trt

BATCH, HEADS, HEAD_DIM, CAPACITY, INNER, OUTER = 2, 8, 128, 1024, 4096, 16384
LINES: list[str] = []


class Logger(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)

    def log(self, severity, message):
        if severity <= trt.ILogger.Severity.WARNING:
            LINES.append(message[:400])


logger = Logger()


def network(builder, weight):
    """Adds the weight as an input if `weight` is None, else as a constant in this host memory."""
    net = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    bf16, i32 = trt.bfloat16, trt.int32
    x = net.add_input("x", bf16, (-1, INNER))
    if weight is None:
        w = net.add_input("w", bf16, (OUTER, INNER))
    else:
        w = net.add_constant((OUTER, INNER), trt.Weights(bf16, weight.data_ptr(), weight.numel())).get_output(0)
    y = net.add_matrix_multiply(x, trt.MatrixOperation.NONE, w, trt.MatrixOperation.TRANSPOSE).get_output(0)
    y.name = "y"
    net.mark_output(y)
    q, k, v = (net.add_input(name, bf16, (-1, HEADS, -1, HEAD_DIM)) for name in "qkv")
    keys, values = (net.add_input(name, bf16, (-1, HEADS, CAPACITY, HEAD_DIM)) for name in ("keys", "values"))
    past, total = (net.add_input(name, i32, (-1,)) for name in ("past", "total"))
    new_keys = net.add_kv_cache_update(keys, k, past, trt.KVCacheMode.LINEAR).get_output(0)
    new_values = net.add_kv_cache_update(values, v, past, trt.KVCacheMode.LINEAR).get_output(0)
    for tensor, name in ((new_keys, "new_keys"), (new_values, "new_values")):
        tensor.name = name
        net.mark_output(tensor)
    attention = net.add_attention_v2(
        q, new_keys, new_values, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.LOWER_RIGHT
    )
    attention.key_value_lengths = total
    out = attention.get_output(0)
    out.name = "out"
    net.mark_output(out)
    return net


def build(mode, weight):
    LINES.clear()
    builder = trt.Builder(logger)
    net = network(builder, weight)
    config = builder.create_builder_config()
    if mode != "unset":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, mode), 0)
    profile = builder.create_optimization_profile()
    head = (HEADS, 1, HEAD_DIM)
    cache = (HEADS, CAPACITY, HEAD_DIM)
    profile.set_shape("x", (1, INNER), (1, INNER), (64, INNER))
    for name in "qkv":
        profile.set_shape(name, (1, *head), (1, *head), (8, HEADS, 256, HEAD_DIM))
    for name in ("keys", "values"):
        profile.set_shape(name, (1, *cache), (1, *cache), (8, *cache))
    for name in ("past", "total"):
        profile.set_shape(name, (1,), (1,), (8,))
    config.add_optimization_profile(profile)
    start = time.perf_counter()
    plan = builder.build_serialized_network(net, config)
    seconds = time.perf_counter() - start
    return plan, {
        "built": plan is not None,
        "seconds": round(seconds, 2),
        "bytes": 0 if plan is None else plan.nbytes,
        "log": LINES[-6:],
    }


def relative(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def run(plan, weight):
    LINES.clear()
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return {"deserialized": False, "log": LINES[-6:]}
    context = engine.create_execution_context()
    if context is None:
        return {"deserialized": True, "context": False, "log": LINES[-6:]}
    answer = {"deserialized": True, "context": True}
    torch.manual_seed(0)
    random = lambda *shape: (torch.randn(*shape, device="cuda") * 0.5).to(torch.bfloat16)
    for tokens in (1, 64):
        past = torch.tensor([100, 37], dtype=torch.int32, device="cuda")
        total = past + tokens
        x = random(BATCH * tokens if tokens == 1 else 64, INNER)
        w = weight.cuda()
        q, k, v = (random(BATCH, HEADS, tokens, HEAD_DIM) for _ in range(3))
        q = (q / math.sqrt(HEAD_DIM)).to(torch.bfloat16)
        keys, values = (random(BATCH, HEADS, CAPACITY, HEAD_DIM) for _ in range(2))
        expected_keys, expected_values = keys.clone(), values.clone()
        expected = torch.empty_like(q, dtype=torch.float32)
        for b in range(BATCH):
            new = slice(int(past[b]), int(total[b]))
            expected_keys[b, :, new], expected_values[b, :, new] = k[b], v[b]
            n = int(total[b])
            scores = q[b].float() @ expected_keys[b, :, :n].float().transpose(-1, -2)
            mask = torch.ones(tokens, n, dtype=torch.bool, device="cuda").tril(n - tokens)
            expected[b] = scores.masked_fill(~mask, -1e30).softmax(-1) @ expected_values[b, :, :n].float()
        y = torch.full((x.shape[0], OUTER), float("nan"), device="cuda", dtype=torch.bfloat16)
        out = torch.full_like(q, float("nan"))
        tensors = dict(x=x, w=w, q=q, k=k, v=v, keys=keys, values=values, past=past, total=total, y=y, out=out)
        tensors |= dict(new_keys=keys, new_values=values)
        ok = True
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            tensor = tensors[name]
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                ok &= bool(context.set_input_shape(name, tuple(tensor.shape)))
            ok &= bool(context.set_tensor_address(name, tensor.data_ptr()))
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        start = time.perf_counter()
        ok &= bool(context.execute_async_v3(stream.cuda_stream))
        stream.synchronize()
        first = time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            for _ in range(20):
                context.execute_async_v3(stream.cuda_stream)
            begin.record(stream)
            for _ in range(100):
                context.execute_async_v3(stream.cuda_stream)
            end.record(stream)
        stream.synchronize()
        answer[f"tokens_{tokens}"] = {
            "enqueued": ok,
            "first_run_seconds": round(first, 3),
            "microseconds_per_run": round(begin.elapsed_time(end) * 10, 1),
            "product_relative_error": relative(y, x.float() @ w.float().T),
            "attention_relative_error": relative(out, expected),
            "cache_is_exact": bool((keys == expected_keys).all() and (values == expected_values).all()),
            "log": LINES[-4:],
        }
    return answer


def main() -> None:
    torch.manual_seed(1)
    weight = (torch.randn(OUTER, INNER) * 0.02).to(torch.bfloat16)
    answer = {"tensorrt_rtx": trt.__version__, "gpu": torch.cuda.get_device_name(0)}
    for mode in ("CURRENT", "unset", "SM80", "SM89", "SM120"):
        for kind, constant in (("input", None), ("constant", weight)):
            key = f"{mode}, weight as {kind}"
            try:
                plan, answer[key] = build(mode, constant)
                if plan is not None:
                    answer[key] |= run(plan, weight)
            except Exception as error:  # the message is the answer
                answer[key] = {**answer.get(key, {}), "exception": repr(error)[:400], "log": LINES[-6:]}
    print(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
