//! Weights rounded by the inputs of their layers, and FP8's recipe: quality, and packages that depend on nothing but their
//! inputs.

use std::path::Path;

use aotron::backend::cpu::CpuOptions;
use aotron::backend::open_cpu;
use aotron::compile::{BuildRequest, Precision, Recipe, WeightRounding, build};
use aotron::engine::Package;
use aotron::isa::CpuFeatures;
use serde_json::Value;

use crate::numerics::score;
use crate::packages::quiet;

const CHECKPOINT: &str = "tests/data/tiny-chat";

fn recipe(precision: Precision) -> Recipe {
    Recipe { precision, ..Recipe::load("cpu").unwrap() }
}

fn package(recipe: Recipe, output: &Path) -> Package {
    let request = BuildRequest {
        checkpoint: CHECKPOINT.into(),
        recipes: vec![recipe],
        output: output.into(),
        replace: false,
        prepare: false,
        calibration: None,
        chat_format: None,
        reference: false,
    };
    build(&request, &quiet()).unwrap();
    Package::open(output).unwrap()
}

/// Prompts of held-out conversations, each followed by its answer.
fn texts() -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(Path::new(CHECKPOINT).join("answers.jsonl")).unwrap();
    let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let of_line = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        let turn = &line["turns"][0];
        [ids(&turn["prompt_ids"]), ids(&turn["token_ids"])].concat()
    };
    text.lines().take(60).map(of_line).collect()
}

/// Logits of all tokens of [`texts`].
fn logits(package: &Package) -> Vec<Vec<f32>> {
    let mut executor = open_cpu(package, &CpuOptions::default()).unwrap();
    texts().iter().map(|ids| score(&mut executor, 0, ids, 32)).collect()
}

/// Mean KL divergence of next-token distributions from those of `expected`.
fn divergence(expected: &[Vec<f32>], found: &[Vec<f32>], vocab_size: usize) -> f64 {
    let log_sum = |row: &[f32]| row.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
    let of_row = |(p, q): (&[f32], &[f32])| -> f64 {
        let (p_sum, q_sum) = (log_sum(p), log_sum(q));
        let term = |(p, q): (&f32, &f32)| {
            let (p, q) = (f64::from(*p) - p_sum, f64::from(*q) - q_sum);
            p.exp() * (p - q)
        };
        p.iter().zip(q).map(term).sum()
    };
    let rows = || expected.iter().zip(found).flat_map(|(p, q)| p.chunks(vocab_size).zip(q.chunks(vocab_size)));
    rows().map(of_row).sum::<f64>() / rows().count() as f64
}

#[test]
fn default_recipes_are_twice_as_close_as_nearest_codes_everywhere() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let exact = package(recipe(Precision::F32), &path("f32"));
    let vocab_size = exact.manifest().model.vocab_size;
    let expected = logits(&exact);
    for precision in [Precision::Int4, Precision::Fp8] {
        let plain =
            Recipe { weight_rounding: WeightRounding::Nearest, keep_bf16: Some(Vec::new()), ..recipe(precision) };
        let plain = package(plain, &path(&format!("{precision}-plain")));
        let rounded = package(recipe(precision), &path(&format!("{precision}-default")));
        let of_plain = divergence(&expected, &logits(&plain), vocab_size);
        let of_rounded = divergence(&expected, &logits(&rounded), vocab_size);
        println!("{precision}: {of_rounded:.6}, {of_plain:.6} with nearest codes everywhere");
        assert!(of_rounded < 0.5 * of_plain, "{precision}: {of_rounded} and {of_plain}");
    }
}

/// SHA-256 of the weights.
fn digest(package: &Package) -> String {
    let plan = &package.manifest().plans[0];
    package.manifest().file(&plan.weights).unwrap().sha256.clone()
}

#[test]
fn rounded_weights_depend_on_neither_threads_nor_cpu() {
    let folder = tempfile::tempdir().unwrap();
    for precision in [Precision::Int4, Precision::Fp8] {
        let on = |threads: usize, cpu: &str| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let cpu = CpuFeatures::by_name(cpu);
            let recipe = Recipe { cpu, ..recipe(precision) };
            let output = folder.path().join(format!("{precision}-{threads}"));
            pool.install(|| digest(&package(recipe, &output)))
        };
        assert_eq!(on(1, "portable"), on(3, "avx512-bf16"), "{precision}");
    }
}
