//! Lowering to the CPU: fusions and sharing of the arena.

use std::path::Path;

use aotron::backend::Limits;
use aotron::backend::cpu::lower::{CpuTarget, LoweredProgram, lower};
use aotron::backend::cpu::program::{Epilogue, Program, ProgramKernel};
use aotron::checkpoint::{Checkpoint, ModelConfig};
use aotron::compile::{Precision, optimized_graph};
use aotron::graph::{Const, Dim, Graph, Input, Op, Sym, Type};
use aotron::tensor::DType;

fn config() -> ModelConfig {
    Checkpoint::open(Path::new("tests/data/shapes/gqa")).unwrap().config().clone()
}

fn limits(vocab_size: usize) -> Limits {
    Limits { slots: 2, max_sequence_tokens: 16, max_step_tokens: 8, max_logits_rows: 4, vocab_size }
}

fn lowered(precision: Precision) -> LoweredProgram {
    let config = config();
    let (graph, _) = optimized_graph(&config, precision, 16, None).unwrap();
    lower(&graph, &limits(config.vocab_size), CpuTarget::native().unwrap()).unwrap()
}

#[test]
fn a_layer_is_eleven_kernels() {
    let layers = config().num_layers;
    for precision in Precision::ALL.into_iter().filter(|p| !p.needs_calibration()) {
        let program = lowered(precision).program;
        // embedding, cosine, sine; the wanted rows, the last norm, the head
        assert_eq!(program.kernels.len(), 11 * layers + 6, "{program}");
        let fused = |e| {
            let does = |k: &&ProgramKernel| match k {
                ProgramKernel::Linear { epilogue, .. } => *epilogue == e,
                _ => false,
            };
            program.kernels.iter().filter(does).count()
        };
        assert_eq!(fused(Epilogue::Accumulate), 2 * layers, "residuals are added by the linear layers");
        assert_eq!(fused(Epilogue::Relu2), layers, "the activation is part of the linear layer");
        assert!(!program.kernels.iter().any(|k| matches!(k, ProgramKernel::Convert { .. })), "{program}");
    }
}

#[test]
fn live_buffers_never_share_bytes() {
    for precision in Precision::ALL.into_iter().filter(|p| !p.needs_calibration()) {
        let Program { buffers, kernels, limits, logits, arena_bytes, .. } = lowered(precision).program;
        let touches = |kernel: &ProgramKernel, buffer: usize| {
            kernel.reads().iter().any(|v| v.buffer == buffer) || kernel.writes().contains(&buffer)
        };
        let life = |buffer: usize| {
            let first = kernels.iter().position(|k| touches(k, buffer)).unwrap();
            let last = kernels.iter().rposition(|k| touches(k, buffer)).unwrap();
            first..=if buffer == logits { kernels.len() } else { last }
        };
        for a in 0..buffers.len() {
            for b in 0..a {
                let (lives, other) = (life(a), life(b));
                if lives.start() > other.end() || other.start() > lives.end() {
                    continue;
                }
                let bytes = |i: usize| buffers[i].offset..buffers[i].offset + buffers[i].max_bytes(&limits).unwrap();
                let (x, y) = (bytes(a), bytes(b));
                assert!(x.end <= y.start || y.end <= x.start, "{} and {}", buffers[a].name, buffers[b].name);
            }
        }
        let all: usize = buffers.iter().map(|b| b.max_bytes(&limits).unwrap()).sum();
        assert!(arena_bytes * 2 < all, "{arena_bytes} bytes for buffers of {all}: nothing is shared");
    }
}

#[test]
fn a_residual_that_is_read_later_is_kept() {
    let mut g = Graph::new();
    let width = Type::new(DType::F32, [Dim::tokens(), 4.into()]);
    let ids = g.input("ids", Input::TokenIds, Type::new(DType::I32, [Dim::tokens()]));
    let rows = g.input("rows", Input::LogitsRows, Type::new(DType::I32, [Dim::sym(Sym::R)]));
    let past = g.input("past", Input::PastTokens, Type::new(DType::I32, [Dim::sym(Sym::B)]));
    let table = g.constant("table", Const::Tensor("t".into()), Type::new(DType::F32, [9.into(), 4.into()]));
    let square = g.constant("square", Const::Tensor("w".into()), Type::new(DType::F32, [4.into(), 4.into()]));
    let cache = Type::new(DType::F32, [Dim::sym(Sym::B), 1.into(), Dim::sym(Sym::S), 4.into()]);
    let keys = g.input("keys", Input::KeyCache(0), cache);
    let h = g.add("h", Op::Gather, &[ids, table]).unwrap();
    assert_eq!(g.node(h).ty, width);
    let product = g.add("product", Op::Linear, &[h, square]).unwrap();
    let sum = g.add("sum", Op::Add, &[h, product]).unwrap();
    let again = g.add("again", Op::Add, &[sum, h]).unwrap(); // h is still needed
    let keys = g.add("keys'", Op::CacheUpdate, &[keys, again, past]).unwrap();
    g.output(keys);
    let last = g.add("last", Op::Gather, &[rows, again]).unwrap();
    let logits = g.add("logits", Op::Linear, &[last, table]).unwrap();
    g.output(logits);
    let program = lower(&g, &limits(9), CpuTarget::native().unwrap()).unwrap().program;
    let accumulates = |k: &&ProgramKernel| matches!(k, ProgramKernel::Linear { epilogue: Epilogue::Accumulate, .. });
    assert_eq!(program.kernels.iter().filter(accumulates).count(), 0, "{program}");
    assert_eq!(program.kernels.iter().filter(|k| matches!(k, ProgramKernel::Add { .. })).count(), 2, "{program}");
}
