//! Logits of packages built from small random checkpoints, against transformers in FP32.

use std::path::{Path, PathBuf};

use aotron::backend::cpu::CpuOptions;
use aotron::backend::{Chunk, Executor, Rows, Step, open_cpu};
use aotron::compile::Precision;

use crate::packages::build_package;

pub fn shapes() -> Vec<PathBuf> {
    ["odd", "gqa", "theta", "wide"].map(|s| Path::new("tests/data/shapes").join(s)).to_vec()
}

/// (ids, logits `[tokens, vocab]`) pairs that the generator stored.
fn golden(shape: &Path) -> Vec<(Vec<u32>, Vec<f32>)> {
    let bytes = std::fs::read(shape.join("golden.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut pairs = Vec::new();
    while let Ok(ids) = file.tensor(&format!("ids.{}", pairs.len())) {
        let logits = file.tensor(&format!("logits.{}", pairs.len())).unwrap();
        let ids = ids.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect();
        pairs.push((ids, logits.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()));
    }
    assert!(!pairs.is_empty());
    pairs
}

/// Logits of every position, in steps of `chunk` tokens.
pub fn score(executor: &mut dyn Executor, slot: usize, ids: &[u32], chunk: usize) -> Vec<f32> {
    let limits = executor.limits().clone();
    let mut logits = Vec::new();
    let mut past_tokens = 0;
    for tokens in ids.chunks(chunk.min(limits.max_logits_rows)) {
        let step = Step::prefill(&limits, &[Chunk { slot, past_tokens, tokens, rows: Rows::All }]).unwrap();
        let mut rows = executor.forward(&step).unwrap();
        (0..rows.rows()).for_each(|i| logits.extend_from_slice(rows.row(i).unwrap()));
        past_tokens += tokens.len();
    }
    logits
}

/// max |a − b| over max |b|
fn relative_error(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let worst = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(got.iter().all(|v| v.is_finite()));
    worst / expected.iter().map(|v| v.abs()).fold(0.0, f32::max)
}

/// What random weights, which average out less than trained ones, allow.
fn tolerance(precision: Precision) -> f32 {
    match precision {
        Precision::F32 => 1e-5,
        Precision::Bf16 => 3e-2,
        Precision::Int8 => 4e-2,
        Precision::Int4 => 4e-1,
        Precision::Fp8 => 2e-1,
    }
}

#[test]
fn logits_are_transformers() {
    for shape in shapes() {
        for precision in Precision::ALL {
            let tolerance = tolerance(precision);
            let folder = tempfile::tempdir().unwrap();
            let package = build_package(&shape, precision, &folder.path().join("engine"));
            for isa in aotron::isa::Isa::available() {
                let options = CpuOptions { threads: Some(2), isa: Some(isa), slots: None };
                let mut executor = open_cpu(&package, &options).unwrap();
                for (ids, expected) in golden(&shape) {
                    let error = relative_error(&score(&mut executor, 1, &ids, 7), &expected);
                    println!("{} {precision} {isa}: {} tokens, {error:.1e}", shape.display(), ids.len());
                    assert!(error < tolerance, "{} {precision} {isa}: {error:e}", shape.display());
                }
            }
        }
    }
}

/// Rows of zeros, a huge weight and tiny ones: no precision makes them infinite, nor moves the others by much.
#[test]
fn zero_rows_and_outliers_survive() {
    let shape = Path::new("tests/data/shapes/odd");
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint");
    std::fs::create_dir(&checkpoint).unwrap();
    for entry in std::fs::read_dir(shape).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), checkpoint.join(entry.file_name())).unwrap();
    }
    let file = checkpoint.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let mut edit = |name: &str, edit: &dyn Fn(usize, f32) -> f32| {
        let (start, end) = metadata.info(name).unwrap().data_offsets;
        let data = &mut bytes[8 + header..][start..end];
        for (index, raw) in data.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *raw = edit(index, f32::from_le_bytes(*raw)).to_le_bytes();
        }
    };
    let hidden = 52;
    edit("model.layers.0.mlp.up_proj.weight", &|i, w| match i / hidden {
        0 => 0.0,
        1 => w * 1e-30,
        2 if i % hidden == 3 => 3.0,
        _ => w,
    });
    edit("model.layers.1.self_attn.q_proj.weight", &|_, _| 0.0);
    edit("model.layers.2.self_attn.o_proj.weight", &|_, w| w * 1e-42);
    std::fs::write(&file, bytes).unwrap();
    let ids: Vec<u32> = (0..40).map(|i| i * 7 % 131).collect();
    let mut expected = Vec::new();
    for precision in Precision::ALL {
        let package = build_package(&checkpoint, precision, &folder.path().join(precision.to_string()));
        let mut executor = open_cpu(&package, &CpuOptions::default()).unwrap();
        let got = score(&mut executor, 0, &ids, 16);
        if precision == Precision::F32 {
            expected = got.clone();
        }
        let error = relative_error(&got, &expected);
        println!("{precision}: {error:.1e}");
        // A row shares one scale with its outlier.
        assert!(error <= 2.0 * tolerance(precision), "{precision}: {error:e}");
    }
}

/// The command, end to end: a package whose checkpoint is gone scores lists of ids as transformers does.
#[test]
fn score_is_transformers_with_the_checkpoint_deleted() {
    for shape in shapes() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (checkpoint, engine, logits) = (path("checkpoint"), path("engine"), path("logits.safetensors"));
        std::fs::create_dir(&checkpoint).unwrap();
        for entry in std::fs::read_dir(&shape).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), Path::new(&checkpoint).join(entry.file_name())).unwrap();
        }
        let ids = shape.join("ids.json").to_str().unwrap().to_owned();
        let run = |arguments: &[&str]| {
            let output = std::process::Command::new(env!("CARGO_BIN_EXE_aotron")).args(arguments).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        run(&["build", &checkpoint, "--recipe", "cpu", "--precision", "f32", "-o", &engine]);
        std::fs::remove_dir_all(&checkpoint).unwrap();
        run(&["score", &engine, "--ids", &ids, "--logits", &logits]);
        let bytes = std::fs::read(&logits).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for (index, (_, expected)) in golden(&shape).iter().enumerate() {
            let tensor = file.tensor(&format!("logits.{index}")).unwrap();
            let got: Vec<f32> = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let error = relative_error(&got, expected);
            assert!(error < 1e-4, "{}: {error:e}", shape.display());
        }
    }
}
