//! CPU plans packed for different CPUs give the same answers, and repacking equals packing from the checkpoint.

use std::path::Path;

use aotron::backend::cpu::CpuOptions;
use aotron::backend::open_cpu;
use aotron::compile::{BuildRequest, FinishRequest, Precision, Recipe, build, finish};
use aotron::engine::Package;
use aotron::isa::{CpuFeatures, Isa};

use crate::cli::aotron;
use crate::numerics::score;
use crate::packages::quiet;

/// A recipe for a CPU by its name.
fn recipe(cpu: &str, precision: Precision, quantize_activations: bool) -> Recipe {
    let recipe = Recipe::load("cpu").unwrap();
    let cpu = Some(CpuFeatures::by_name(cpu).unwrap());
    Recipe { precision, cpu, quantize_activations: Some(quantize_activations), ..recipe }
}

fn package(recipe: Recipe, output: &Path) -> Package {
    let request = BuildRequest {
        checkpoint: "tests/data/tiny-chat".into(),
        recipes: vec![recipe],
        output: output.into(),
        replace: false,
        prepare: false,
        calibration: None,
        chat_format: None,
        reference: true,
    };
    build(&request, &quiet()).unwrap();
    Package::open(output).unwrap()
}

fn repacked(output: &Path, recipe: Recipe) -> Package {
    finish(&FinishRequest { package: output.into(), recipe: Some(recipe) }, &quiet()).unwrap();
    let package = Package::open(output).unwrap();
    package.verify(&|_| {}).unwrap();
    package
}

/// Digests of the plan and its weights.
fn digests(package: &Package) -> Vec<String> {
    let plan = &package.manifest().plans[0];
    plan.files().map(|file| package.manifest().file(file).unwrap().sha256.clone()).collect()
}

fn logits(package: &Package, isa: Isa) -> Vec<f32> {
    let mut executor = open_cpu(package, &CpuOptions { isa: Some(isa), ..CpuOptions::default() }).unwrap();
    let ids: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 4000).collect();
    let ids: Vec<u32> = ids.iter().map(|id| id % package.manifest().model.vocab_size as u32).collect();
    score(&mut executor, 0, &ids, 7)
}

#[test]
fn a_package_for_one_cpu_answers_the_same_on_every_other() {
    let folder = tempfile::tempdir().unwrap();
    let vnni = package(recipe("avx512-vnni", Precision::Int8, true), &folder.path().join("vnni"));
    let avx2 = package(recipe("avx2", Precision::Int8, true), &folder.path().join("avx2"));
    assert_ne!(digests(&vnni), digests(&avx2), "another packing");
    for isa in Isa::available() {
        // Kernels for other precisions round differently on other instruction sets; packings do not change any result.
        assert_eq!(logits(&vnni, isa), logits(&avx2, isa), "{isa}");
    }
    // 8-bit activations are another precision, close to the one without.
    let float = package(recipe("avx2", Precision::Int8, false), &folder.path().join("float"));
    let (float, int8) = (logits(&float, Isa::detect()), logits(&avx2, Isa::detect()));
    let largest = float.iter().fold(0f32, |most, v| most.max(v.abs()));
    let worst = float.iter().zip(&int8).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(worst > 0.0 && worst < 0.1 * largest, "{worst} of {largest}");
}

#[test]
fn packing_again_gives_what_the_checkpoint_gives() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    let first = package(recipe("avx512-vnni", Precision::Int8, true), &output);
    let (vnni, tokenizer) = (digests(&first), first.manifest().tokenizer.clone());
    let direct = package(recipe("avx2", Precision::Int8, true), &folder.path().join("direct"));
    // Settings that the recipe leaves open stay as they were.
    let avx2 = Recipe { quantize_activations: None, ..recipe("avx2", Precision::Bf16, false) };
    let again = repacked(&output, avx2);
    assert_eq!(digests(&again), digests(&direct));
    assert_eq!(again.manifest().tokenizer, tokenizer);
    assert_eq!(digests(&repacked(&output, recipe("avx512-vnni", Precision::Int8, true))), vnni);
    // 8-bit activations can be enabled and disabled without the checkpoint.
    let float = package(recipe("avx2", Precision::Int8, false), &folder.path().join("float"));
    assert_eq!(digests(&repacked(&output, recipe("avx2", Precision::Int8, false))), digests(&float));
    // With 4-bit weights that takes another packing.
    let output = folder.path().join("int4-float");
    let float = digests(&package(recipe("avx2", Precision::Int4, false), &output));
    let int8 = digests(&package(recipe("avx2", Precision::Int4, true), &folder.path().join("int4-int8")));
    assert_ne!(int8, float);
    assert_eq!(digests(&repacked(&output, recipe("avx2", Precision::Int4, true))), int8);
    assert_eq!(digests(&repacked(&output, recipe("avx2", Precision::Int4, false))), float);
    for precision in [Precision::Bf16, Precision::Int4, Precision::Fp8, Precision::W8a8] {
        let output = folder.path().join(precision.to_string());
        let before = package(Recipe { quantize_activations: None, ..recipe("avx2", precision, false) }, &output);
        let again = repacked(&output, Recipe { quantize_activations: None, ..recipe("avx2", precision, false) });
        assert_eq!(digests(&again), digests(&before), "{precision}");
    }
}

#[test]
fn the_stored_recipe_is_the_one_the_plan_was_made_by() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    package(recipe("avx2", Precision::Int8, false), &output);
    let stored = |package: &Package| package.manifest().plans[0].recipe.clone();
    let file = |slots: usize, more: &str| {
        let text = format!(
            "target = 'cpu'\nprecision = 'int8'\nslots = {slots}\nprefill_chunk_tokens = 16\nlogits_rows = 5\n{more}"
        );
        let path = folder.path().join("mine.toml");
        std::fs::write(&path, &text).unwrap();
        let cpu = CpuFeatures::by_name("avx2");
        (Recipe { cpu, ..Recipe::load(path.to_str().unwrap()).unwrap() }, text)
    };
    // A file's settings are taken, and its text is kept.
    let (mine, text) = file(3, "activations = 'int8'\n");
    let again = repacked(&output, mine);
    assert_eq!(stored(&again), format!("{text}# Packed again for the CPU avx2\n"));
    let limits = &again.manifest().plans[0].limits;
    assert_eq!((limits.slots, limits.max_step_tokens, limits.max_logits_rows), (3, 16, 5));
    logits(&again, Isa::detect());
    // A built-in recipe is named for its target only: the text stays, with one line on the last repacking.
    let again = repacked(&output, Recipe { quantize_activations: None, ..recipe("portable", Precision::Bf16, false) });
    assert_eq!(stored(&again), format!("{text}# Packed again for the CPU portable\n"));
    let again = repacked(&output, recipe("avx2", Precision::Bf16, false));
    assert_eq!(stored(&again), format!("{text}# Packed again for the CPU avx2, with activations = \"float\"\n"));

    // What the weights decide is refused by name.
    let tokens = again.manifest().plans[0].limits.max_sequence_tokens;
    repacked(&output, file(2, &format!("max_sequence_tokens = {tokens}\n")).0);
    let refused = |recipe: Recipe| {
        let request = FinishRequest { package: output.clone(), recipe: Some(recipe) };
        finish(&request, &quiet()).unwrap_err().to_string()
    };
    let error = refused(file(2, "max_sequence_tokens = 64\n").0);
    assert!(error.contains("mine.toml: max_sequence_tokens is 64, but the weights of"), "{error}");
    let error = refused(Recipe { precision: Precision::Bf16, ..file(2, "").0 });
    assert!(error.contains("mine.toml: precision is bf16") && error.contains("were made for int8"), "{error}");
}

#[test]
fn what_cannot_be_packed_again_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    let bf16 = Recipe { quantize_activations: None, ..recipe("avx2", Precision::Bf16, false) };
    package(bf16, &output);
    let refused = |recipe| {
        let request = FinishRequest { package: output.clone(), recipe: Some(recipe) };
        finish(&request, &quiet()).unwrap_err().to_string()
    };
    let error = refused(recipe("avx2", Precision::Int8, true));
    assert!(
        error.contains("activations = \"int8\" is for the target cpu in precision int8 or int4, not for cpu in bf16"),
        "{error}"
    );
    let before = std::fs::read(output.join("plans/cpu.json")).unwrap();
    let weights = output.join("weights/cpu-bf16.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let error = refused(Recipe { quantize_activations: None, ..recipe("portable", Precision::Bf16, false) });
    assert!(error.contains("weights/cpu-bf16.safetensors does not match its digest"), "{error}");
    assert_eq!(std::fs::read(output.join("plans/cpu.json")).unwrap(), before, "the package is as it was");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
}

/// A link to a package is followed, and what somebody else put into a package's folder is not deleted with it.
#[test]
fn packing_again_replaces_the_package_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (real, link) = (path("real"), path("link"));
    aotron(&["build", "tests/data/tiny-chat", "-o", &real, "--cpu", "avx2"]).ok();
    std::os::unix::fs::symlink("real", &link).unwrap();
    let again = ["build", &link, "--finish", "--recipe", "cpu", "--cpu", "portable"];
    let packed_for = || aotron(&["inspect", &real, "--format", "json"]).ok().json()["cpu_plan"]["packed_for"].clone();
    assert_eq!(packed_for(), "avx2");
    aotron(&again).ok();
    assert_eq!(packed_for(), "portable");
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    let notes = folder.path().join("real/notes.txt");
    std::fs::write(&notes, "mine").unwrap();
    aotron(&again).fails(1, &["notes.txt, which is not part of the package; move it elsewhere"]);
    aotron(&["build", "tests/data/tiny-chat", "-o", &real, "--force"]).fails(1, &["notes.txt"]);
    assert_eq!(std::fs::read_to_string(&notes).unwrap(), "mine");
    std::fs::remove_file(notes).unwrap();
    aotron(&["build", "tests/data/tiny-chat", "-o", &real, "--recipe", "/dev/zero", "--force"])
        .fails(1, &["/dev/zero", "at most"]);
}
