//! Verification of CPU plans: every precision and instruction set passes, and what is damaged is refused.

use std::path::Path;

use aotron::backend::cpu::CpuOptions;
use aotron::backend::{ExecutorOptions, select};
use aotron::compile::{BuildRequest, FinishRequest, Precision, Recipe, build, finish};
use aotron::engine::{Package, PackageWriter};
use aotron::isa::Isa;
use aotron::tensor_file::encode_header;
use aotron::verify::{Gate, Reference, Report, VerifyOptions, open_unchecked};
use aotron::{Error, Model};
use half::bf16;
use safetensors::tensor::Dtype;

use crate::cli::aotron;
use crate::packages::{build_package, build_recipes, quiet};
use crate::tensorrt::rtx;

/// The instruction set that builds use.
fn here() -> Isa {
    Isa::from_environment().unwrap()
}

/// Pseudo-random numbers between -1 and 1.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Sizes of [`grouped_checkpoint`].
const HIDDEN: usize = 48;
const HEADS: usize = 6;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 12;
const INNER: usize = 80;
pub const VOCAB: usize = 160;

/// Writes a checkpoint with grouped queries whose layers all matter, unlike those of a model before its training.
pub fn grouped_checkpoint(path: &Path, layers: usize) {
    std::fs::create_dir_all(path).unwrap();
    let text = std::fs::read_to_string("tests/data/shapes/gqa/config.json").unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["num_hidden_layers"] = layers.into();
    config["vocab_size"] = VOCAB.into();
    std::fs::write(path.join("config.json"), config.to_string()).unwrap();
    let mut tensors: Vec<(String, Vec<usize>, f32)> =
        vec![("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN], 1.0)];
    for layer in 0..layers {
        let mut add = |name: &str, shape: &[usize], size: f32| {
            tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec(), size));
        };
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(&format!("{norm}.weight"), &[HIDDEN], 0.3);
            add(&format!("{norm}.bias"), &[HIDDEN], 0.3);
        }
        add("self_attn.q_proj.weight", &[HEADS * HEAD_DIM, HIDDEN], 0.4);
        add("self_attn.k_proj.weight", &[KV_HEADS * HEAD_DIM, HIDDEN], 0.4);
        add("self_attn.v_proj.weight", &[KV_HEADS * HEAD_DIM, HIDDEN], 0.3);
        add("self_attn.o_proj.weight", &[HIDDEN, HEADS * HEAD_DIM], 0.2);
        add("mlp.up_proj.weight", &[INNER, HIDDEN], 0.2);
        add("mlp.down_proj.weight", &[HIDDEN, INNER], 0.1);
    }
    tensors.push(("model.norm.weight".into(), vec![HIDDEN], 0.3));
    tensors.push(("model.norm.bias".into(), vec![HIDDEN], 0.3));
    tensors.push(("lm_head.weight".into(), vec![VOCAB, HIDDEN], 0.4));
    let header: Vec<_> = tensors.iter().map(|(name, shape, _)| (name.as_str(), Dtype::BF16, shape.clone())).collect();
    let mut bytes = encode_header(&header).unwrap();
    let mut noise = Noise(1);
    for (_, shape, size) in &tensors {
        for _ in 0..shape.iter().product() {
            bytes.extend(bf16::from_f32(noise.next() * size).to_le_bytes());
        }
    }
    std::fs::write(path.join("model.safetensors"), bytes).unwrap();
}

fn verified(package: &Package, isa: Isa) -> aotron::Result<Report> {
    let cpu = CpuOptions { isa: Some(isa), slots: Some(3), ..CpuOptions::default() };
    let options = ExecutorOptions { target: Some("cpu".into()), cpu, ..ExecutorOptions::default() };
    let selection = select(package, &options)?;
    let gate = Gate::new(package, &selection)?;
    let mut opened = open_unchecked(package, &selection, &options)?;
    gate.verify(&mut opened, &VerifyOptions { most_tokens: Some(100), ..VerifyOptions::default() })
}

#[test]
fn cpu_plans_pass_in_every_precision_on_every_instruction_set() {
    let folder = tempfile::tempdir().unwrap();
    for checkpoint in ["tiny-chat", "shapes/odd", "shapes/gqa", "shapes/theta", "shapes/wide"] {
        for precision in Precision::ALL {
            let output = folder.path().join(format!("{}-{precision}", checkpoint.replace('/', "-")));
            let package = build_package(&Path::new("tests/data").join(checkpoint), precision, &output);
            for isa in Isa::available() {
                let report = verified(&package, isa).unwrap();
                assert!(report.passes(), "{checkpoint} {precision} {isa}: {}", report.words());
                let answers = report.cases.iter().find(|case| case.case.starts_with("the CPU's answers")).unwrap();
                println!("{checkpoint} {precision} {isa}: {:.1e} of {:.1e}", answers.worst_error, answers.limit);
                assert!(answers.rows >= 100 && 1.5 * answers.worst_error <= answers.limit, "{answers:?}");
                assert_eq!(answers.limit == 0.0, isa == here(), "the set it was built with gives the same bits");
            }
        }
    }
}

/// Writes a copy of a package with one file changed, sealed again as if it had been built so.
fn resealed(package: &Package, file: &str, change: impl FnOnce(&mut Vec<u8>), output: &Path) -> Package {
    let mut writer = PackageWriter::create(output, true).unwrap();
    let mut manifest = package.manifest().clone();
    let mut bytes = std::fs::read(package.file_path(file)).unwrap();
    change(&mut bytes);
    for info in manifest.files.iter().filter(|info| info.path != file) {
        writer.add_existing(package.path(), info).unwrap();
    }
    writer.add(file, |write| write(&bytes)).unwrap();
    writer.finish(&mut manifest).unwrap();
    Package::open(output).unwrap()
}

#[test]
fn a_damaged_weight_is_caught_by_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let package = build_package(Path::new("tests/data/shapes/gqa"), Precision::Bf16, &folder.path().join("whole"));
    let file = package.manifest().plans[0].weights.clone();
    let bytes = package.manifest().file(&file).unwrap().bytes as usize;
    // One bit of one weight, in the middle of the file: among the packed matrices.
    let flip = |bit: u8| move |content: &mut Vec<u8>| content[(bytes / 2) | 1] ^= bit;
    let damaged = resealed(&package, &file, flip(0x40), &folder.path().join("damaged"));
    let report = verified(&damaged, here()).unwrap();
    let failed: Vec<&str> = report.failures().map(|case| case.case).collect();
    assert!(failed.contains(&"the CPU's answers, prefilled"), "{failed:?}");
    assert!(!failed.iter().any(|case| case.contains("prefilled in chunks")), "it agrees with itself: {failed:?}");
    let words = report.words();
    assert!(words.contains("prompt \"") && words.contains("position") && words.contains("instead of"), "{words}");
    // The lowest bit too, with the instruction set that must give the same bits.
    let damaged = resealed(&package, &file, |content| content[(bytes / 2) & !1] ^= 1, &folder.path().join("hardly"));
    assert!(!verified(&damaged, here()).unwrap().passes());
}

#[test]
fn the_command_prints_a_table_and_fails_if_a_case_does() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("whole");
    let package = build_package(Path::new("tests/data/shapes/gqa"), Precision::Bf16, &output);
    let path = output.to_str().unwrap();
    let table = aotron(&["verify", path]).ok().out;
    assert!(table.starts_with("case ") && table.contains("the CPU's answers, prefilled"), "{table}");
    assert!(table.contains("passed") && !table.contains("FAILED"), "{table}");
    let json = aotron(&["verify", path, "--json", "--target", "cpu"]).ok().json();
    assert_eq!(
        (&json["passed"], &json["compared_with_cpu"], &json["target"]),
        (&true.into(), &true.into(), &"cpu".into())
    );
    assert!(json["cases"].as_array().unwrap().iter().all(|case| case["worst_error"] == 0.0), "{json}");
    aotron(&["verify", path, "--accept-unverified"]).fails(2, &["--accept-unverified"]);
    aotron(&["verify", path, "--target", "a100"]).fails(1, &["it has no plan for a100"]);

    let file = package.manifest().plans[0].weights.clone();
    let damaged = folder.path().join("damaged");
    resealed(
        &package,
        &file,
        |content| {
            let middle = content.len() / 2;
            content[middle | 1] ^= 0x40;
        },
        &damaged,
    );
    let ran = aotron(&["verify", damaged.to_str().unwrap()]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.out.contains("FAILED") && ran.out.contains("worst: "), "{}", ran.out);
    assert!(ran.err.contains("plan cpu (bf16) gives wrong answers: ") && ran.err.contains("build the package again"));
}

#[test]
fn a_reference_that_was_tampered_with_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    let package = build_package(Path::new("tests/data/shapes/gqa"), Precision::F32, &output);
    let file = package.manifest().reference.clone().unwrap();
    let text = std::fs::read_to_string(package.file_path(&file)).unwrap();
    let refused = |package: &Package| verified(package, here()).unwrap_err().to_string();

    // Of the same length, so that only its digest tells.
    let at = text.find("\"values\":[").unwrap() + 11;
    let digit = if &text[at..=at] == "1" { "2" } else { "1" };
    std::fs::write(package.file_path(&file), format!("{}{digit}{}", &text[..at], &text[at + 1..])).unwrap();
    assert!(refused(&package).contains("reference.json does not match its digest: it is damaged"));
    std::fs::write(package.file_path(&file), &text[1..]).unwrap();
    assert!(Package::open(&output).unwrap_err().to_string().contains("reference.json has"));
    std::fs::remove_file(package.file_path(&file)).unwrap();
    assert!(Package::open(&output).unwrap_err().to_string().contains("reference.json is missing"));
    std::fs::write(package.file_path(&file), &text).unwrap();
    assert!(verified(&package, here()).unwrap().passes());

    // Sealed again, it must still make sense.
    for (old, new, words) in [
        ("\"version\":1", "\"version\":2", "version 2, this aotron reads version 1"),
        ("\"token_ids\":[", "\"token_ids\":[97,", "not of the model's vocabulary"),
        ("\"top\":16", "\"top\":99", "do not fit the prompts"),
        ("{", "", "reference.json: "),
        ("\"mean\":", "\"mean\":1e999,\"was\":", "reference.json: "),
    ] {
        let changed = text.replacen(old, new, 1);
        assert_ne!(changed, text, "{old}");
        let other = resealed(&package, &file, |bytes| *bytes = changed.into_bytes(), &folder.path().join("other"));
        let error = refused(&other);
        assert!(error.contains(words) && error.contains("build the package again"), "{error}");
    }
    // A CPU plan runs all the same: only verification reads it.
    assert!(Model::open(folder.path().join("other")).unwrap().session().is_ok());
}

#[test]
fn a_package_without_a_reference_says_so_and_is_compared_with_itself() {
    struct Warned(std::sync::Mutex<Vec<String>>);
    impl aotron::Progress for Warned {
        fn stage(&self, _: &str, _: u64) {}
        fn advance(&self, _: u64) {}
        fn warn(&self, message: &str) {
            self.0.lock().unwrap().push(message.into());
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let request = BuildRequest {
        checkpoint: "tests/data/shapes/gqa".into(),
        recipes: vec![Recipe::load("cpu").unwrap()],
        output: folder.path().join("bare"),
        replace: false,
        prepare: false,
        calibration: None,
        chat_format: None,
        reference: false,
    };
    let warned = std::sync::Arc::new(Warned(Default::default()));
    build(&request, &(warned.clone() as std::sync::Arc<dyn aotron::Progress>)).unwrap();
    assert!(warned.0.lock().unwrap().iter().any(|warning| warning.contains("--no-reference")));
    let package = Package::open(&request.output).unwrap();
    assert!(package.manifest().reference.is_none());
    let report = verified(&package, here()).unwrap();
    assert!(report.passes() && report.cases.iter().all(|case| !case.case.starts_with("the CPU's")));
}

#[test]
fn repacking_keeps_the_reference_or_asks_again() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    build_package(Path::new("tests/data/tiny-chat"), Precision::Int8, &output);
    let answers =
        |package: &Package| Reference::of_package(package).unwrap().unwrap().answers_for("cpu").unwrap().clone();
    let before = answers(&Package::open(&output).unwrap());
    let mut rows = Vec::new();
    for quantize in [Some(false), Some(true)] {
        let recipe = Recipe { quantize_activations: quantize, ..Recipe::load("cpu").unwrap() };
        let recipe = Recipe { precision: Precision::Int8, ..recipe };
        finish(&FinishRequest { package: output.clone(), recipe: Some(recipe) }, &quiet()).unwrap();
        let package = Package::open(&output).unwrap();
        package.verify(&|_| {}).unwrap();
        let report = verified(&package, here()).unwrap();
        assert!(report.passes(), "{}", report.words());
        rows.push(answers(&package).rows);
    }
    assert_eq!(rows[0], before.rows);
    assert_ne!(rows[1], before.rows, "8-bit activations give other answers");
}

/// A package with plans for GPUs alone holds the CPU's answers too, and keeps them when a plan is compiled again.
#[test]
fn gpu_packages_hold_the_cpus_answers() {
    if rtx("gpu_packages_hold_the_cpus_answers").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let tiny_chat = Path::new("tests/data/tiny-chat");
    let reference = |path: &Path| Reference::of_package(&Package::open(path).unwrap()).unwrap().unwrap();
    let [cpu, gpu, both] = ["cpu", "gpu", "both"].map(|name| folder.path().join(name));
    for precision in [Precision::Int8, Precision::Bf16] {
        build_recipes(tiny_chat, &[("cpu", precision)], false, &cpu).unwrap();
        build_recipes(tiny_chat, &[("a100", precision)], false, &gpu).unwrap();
        let expected = reference(&cpu);
        assert_eq!(reference(&gpu).prompts, expected.prompts);
        let of_gpu = reference(&gpu).answers_for("a100").unwrap().clone();
        assert_eq!(of_gpu.rows, expected.answers_for("cpu").unwrap().rows, "{precision}: the same bits");
        for path in [&cpu, &gpu] {
            std::fs::remove_dir_all(path).unwrap();
        }
    }
    build_recipes(tiny_chat, &[("cpu", Precision::Bf16), ("a100", Precision::Bf16)], false, &both).unwrap();
    assert_eq!(reference(&both).answers[0].targets, ["cpu", "a100"], "one set of answers for both");
    finish(&FinishRequest { package: both.clone(), recipe: None }, &quiet()).unwrap();
    Package::open(&both).unwrap().verify(&|_| {}).unwrap();
    assert_eq!(reference(&both).answers[0].targets, ["cpu", "a100"]);
}

#[test]
fn what_is_not_finite_is_no_reference() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint");
    std::fs::create_dir(&checkpoint).unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        std::fs::copy(Path::new("tests/data/shapes/wide").join(file), checkpoint.join(file)).unwrap();
    }
    // Every weight becomes as large as BF16 allows, so that the logits overflow.
    let path = checkpoint.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[header..].chunks_exact_mut(2).for_each(|weight| weight.copy_from_slice(&[0x7f, 0x7f]));
    std::fs::write(&path, bytes).unwrap();
    let recipe = Recipe { precision: Precision::F32, ..Recipe::load("cpu").unwrap() };
    let request = BuildRequest {
        checkpoint,
        recipes: vec![recipe],
        output: folder.path().join("engine"),
        replace: false,
        prepare: false,
        calibration: None,
        chat_format: None,
        reference: true,
    };
    let error = build(&request, &quiet()).unwrap_err();
    assert!(matches!(&error, Error::Numerics(detail) if detail.starts_with("reference: ")), "{error}");
    assert!(!request.output.exists(), "nothing is left behind");
}
