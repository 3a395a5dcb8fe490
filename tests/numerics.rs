//! Logits of packages built from small random checkpoints, against transformers in FP32.

use std::path::{Path, PathBuf};

use aotron::backend::cpu::CpuOptions;
use aotron::backend::{Chunk, Executor, Rows, Step, cpu_program, open_cpu};
use aotron::checkpoint::Checkpoint;
use aotron::compile::{Calibration, Precision, Recipe, optimized_graph};
use aotron::engine::Package;
use aotron::graph::Graph;

use crate::packages::{build_calibrated, build_package};
use crate::reference::{self, Matrix, Tensors};

pub fn shapes() -> Vec<PathBuf> {
    ["odd", "gqa", "theta", "wide"].map(|s| Path::new("tests/data/shapes").join(s)).to_vec()
}

/// (ids, logits `[tokens, vocab]`) pairs stored by the generator.
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

/// Logits of every position, computed in steps of `chunk` tokens.
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

/// Effect of quantizing to these precisions on random weights, whose errors average out less than trained ones'. INT4
/// and FP8 lose more than most kernel bugs would cost: only [`kernels_compute_the_graph`] can detect those.
const CLOSE: [(Precision, f32); 3] = [(Precision::F32, 1e-5), (Precision::Bf16, 3e-2), (Precision::Int8, 4e-2)];

#[test]
fn logits_are_transformers() {
    for shape in shapes() {
        for (precision, tolerance) in CLOSE {
            let folder = tempfile::tempdir().unwrap();
            let package = build_package(&shape, precision, &folder.path().join("engine"));
            for isa in aotron::isa::Isa::available() {
                let options = CpuOptions { threads: Some(2), isa: Some(isa), ..CpuOptions::default() };
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

/// A checkpoint's graph as the CPU runs it, and its constants.
struct Reference {
    graph: Graph,
    constants: Vec<Matrix>,
}

impl Reference {
    fn new(shape: &Path, (package, calibration): (&Package, &Calibration), precision: Precision) -> Reference {
        let checkpoint = Checkpoint::open(shape).unwrap();
        let (plan, program) = cpu_program(package).unwrap();
        let scales = Calibration::of_program(&program);
        let calibrated = calibration.without(Recipe { precision, ..Recipe::load("cpu").unwrap() }.kept_in_bf16());
        assert_eq!(scales.scales(), calibrated.scales(), "{precision}");
        let positions = plan.limits.max_sequence_tokens;
        let (graph, _) = optimized_graph(checkpoint.config(), precision, positions, Some(&calibrated)).unwrap();
        let constants = reference::constants(&graph, &Tensors::read(shape));
        Reference { graph, constants }
    }

    fn logits(&self, ids: &[u32]) -> Vec<f64> {
        reference::logits(&self.graph, &self.constants, ids)
    }

    /// The constant of this name.
    fn constant(&mut self, name: &str) -> &mut Matrix {
        let value = self.graph.iter().find(|(_, node)| node.name == name).map(|(value, _)| value);
        &mut self.constants[value.unwrap_or_else(|| panic!("no constant {name}")).index()]
    }
}

/// ‖a − b‖ / ‖b‖. A value near a rounding boundary of BF16 or E4M3 may round either way if it was summed in another
/// order; such values are few, so they weigh little here, whereas they would dominate a maximum.
fn distance(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let difference: f64 = got.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    (difference / expected.iter().map(|b| b.powi(2)).sum::<f64>()).sqrt()
}

/// Bound on [`distance`] when codes and scales are the same: only the kernels' own rounding is left.
fn kernel_tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 1e-5,
        // Measured: at most 2e-3, from values around a hundred that rounded the other way.
        Precision::Bf16 | Precision::Int8 | Precision::Int4 | Precision::Fp8 | Precision::W8a8 => 3e-3,
    }
}

#[test]
fn kernels_compute_the_graph() {
    for shape in shapes() {
        for precision in Precision::ALL {
            let folder = tempfile::tempdir().unwrap();
            let (package, calibration) = build_calibrated(&shape, precision, &folder.path().join("engine"));
            let reference = Reference::new(&shape, (&package, &calibration), precision);
            for (ids, _) in golden(&shape) {
                let expected = reference.logits(&ids);
                for isa in aotron::isa::Isa::available() {
                    let options = CpuOptions { threads: Some(2), isa: Some(isa), ..CpuOptions::default() };
                    let mut executor = open_cpu(&package, &options).unwrap();
                    let distance = distance(&score(&mut executor, 1, &ids, 7), &expected);
                    println!("{} {precision} {isa}: {} tokens, {distance:.1e}", shape.display(), ids.len());
                    let what = format!("{} {precision} {isa}", shape.display());
                    assert!(distance < kernel_tolerance(precision), "{what}: {distance:e}");
                }
            }
        }
    }
}

/// Shows that the tolerance is tight enough: kernels with an off-by-one error in reading scales or codes would fail
/// [`kernels_compute_the_graph`].
#[test]
fn a_wrong_kernel_would_be_seen() {
    let weight = "model.layers.1.mlp.up_proj.weight";
    type Mistake = fn(&mut Matrix);
    let mistakes: [(&str, &str, Mistake); 5] = [
        ("a scale is half as large again", "scales", |scales| scales.values[3] *= 1.5),
        ("each row takes the next one's scales", "scales", |scales| scales.values.rotate_left(scales.width)),
        ("the rows' last scale serves all their blocks", "scales", |scales| {
            scales.values.chunks_mut(scales.width).for_each(|row| row.fill(row[row.len() - 1]));
        }),
        ("neighbouring codes change places", "codes", |codes| {
            codes.values.chunks_exact_mut(2).for_each(|pair| pair.swap(0, 1));
        }),
        ("a row's last code is left out", "codes", |codes| {
            codes.values.chunks_mut(codes.width).for_each(|row| row[row.len() - 1] = 0.0);
        }),
    ];
    for shape in shapes() {
        for precision in [Precision::Int8, Precision::Int4, Precision::Fp8, Precision::W8a8] {
            let folder = tempfile::tempdir().unwrap();
            let (package, calibration) = build_calibrated(&shape, precision, &folder.path().join("engine"));
            let mut executor = open_cpu(&package, &CpuOptions::default()).unwrap();
            let (ids, _) = golden(&shape).into_iter().max_by_key(|(ids, _)| ids.len()).unwrap();
            let got = score(&mut executor, 0, &ids, 7);
            let mut reference = Reference::new(&shape, (&package, &calibration), precision);
            let codes = precision.scheme().unwrap().dtype().to_string();
            for (words, what, mistake) in &mistakes {
                let name = format!("{weight}.{}", if *what == "codes" { &codes } else { *what });
                let right = reference.constant(&name).clone();
                mistake(reference.constant(&name));
                if right == *reference.constant(&name) {
                    continue; // rows of one block have no other scale to take
                }
                let distance = distance(&got, &reference.logits(&ids));
                *reference.constant(&name) = right;
                println!("{} {precision}, {words}: {distance:.1e}", shape.display());
                assert!(distance > 2.0 * kernel_tolerance(precision), "{} {precision}, {words}", shape.display());
            }
        }
    }
}

/// All-zero rows, a huge weight and tiny ones: no precision turns them infinite, and the kernels handle them like any
/// others.
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
    for precision in Precision::ALL {
        let (package, calibration) =
            build_calibrated(&checkpoint, precision, &folder.path().join(precision.to_string()));
        let expected = Reference::new(&checkpoint, (&package, &calibration), precision).logits(&ids);
        let mut executor = open_cpu(&package, &CpuOptions::default()).unwrap();
        let got = score(&mut executor, 0, &ids, 16);
        assert!(got.iter().all(|v| v.is_finite()), "{precision}");
        let distance = distance(&got, &expected);
        println!("{precision}: {distance:.1e}");
        assert!(distance < kernel_tolerance(precision), "{precision}: {distance:e}");
    }
}

/// The command, end to end: a package whose checkpoint has been deleted scores lists of ids as transformers does.
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
