//! Packages with GPU plans: built with the real TensorRT for RTX if it is installed, opened on a machine without a GPU.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use aotron::compile::{FinishRequest, Precision, Recipe, finish};
use aotron::engine::tensorrt::{BindingRole, Extent, LibraryKind};
use aotron::engine::{Package, PlanInfo};
use aotron::tensor_file::TensorFile;

use crate::packages::{build_recipes, quiet};
use crate::tensorrt::rtx;

const TINY_CHAT: &str = "tests/data/tiny-chat";

fn open(path: &Path) -> Package {
    let package = Package::open(path).unwrap();
    package.verify(&|_| {}).unwrap();
    package
}

fn plan<'p>(package: &'p Package, target: &str) -> &'p PlanInfo {
    package.manifest().plans.iter().find(|plan| plan.target == target).unwrap()
}

/// The digest of every file, by name.
fn digests(package: &Package) -> Vec<(String, String)> {
    package.manifest().files.iter().map(|file| (file.path.clone(), file.sha256.clone())).collect()
}

#[test]
fn a100_plans_build_in_every_precision() {
    if rtx("a100_plans_build_in_every_precision").is_none() {
        return;
    }
    for precision in [Precision::Bf16, Precision::Int8, Precision::Int4] {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("engine");
        let summary = build_recipes(Path::new(TINY_CHAT), &[("a100", precision)], false, &output).unwrap();
        assert!(!summary.plans[0].only_prepared);
        let package = open(&output);
        let plan = plan(&package, "a100");
        let info = plan.tensorrt.as_ref().unwrap();
        let compiled = info.compiled.as_ref().unwrap();
        assert_eq!((info.compute_capability, compiled.library), (80, LibraryKind::Rtx));
        assert!(compiled.version.starts_with("1."), "{}", compiled.version);
        assert_eq!(plan.kv_bytes_per_token, 2 * 5 * 6 * 32 * 2);
        // Embedded weights would be on the GPU twice with a second plan.
        assert_eq!(compiled.context_plan.is_some(), precision != Precision::Int4);
        for file in plan.files().filter(|file| file.ends_with(".engine")) {
            assert!(package.manifest().file(file).unwrap().bytes > 100_000, "{file}");
        }
        // Binding names are unique, and each weight is in the file with the type and shape the plan expects.
        let names: HashSet<&str> = info.bindings.iter().map(|binding| binding.name.as_str()).collect();
        assert_eq!(names.len(), info.bindings.len());
        let weights = TensorFile::open(&package.file_path(&plan.weights)).unwrap();
        for binding in info.bindings.iter().filter(|binding| binding.role == BindingRole::Weight) {
            let (stored, _) = weights.tensor(&binding.name).unwrap_or_else(|| panic!("{} is not there", binding.name));
            let shape: Vec<Extent> = stored.shape.iter().map(|n| Extent::Fixed(*n)).collect();
            assert_eq!(shape, binding.shape, "{binding}");
            assert_eq!(stored.bytes.len(), stored.shape.iter().product::<usize>() * binding.dtype.bytes(), "{binding}");
        }
        let caches =
            info.bindings.iter().filter(|b| matches!(b.role, BindingRole::KeyCache(_) | BindingRole::ValueCache(_)));
        assert_eq!(caches.count(), 10);
    }
}

#[test]
fn h100_is_refused_prepared_and_left_whole() {
    if rtx("h100_is_refused_prepared_and_left_whole").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    let fp8 = [("h100", Precision::Fp8)];
    // Refused before the checkpoint is read.
    let error = build_recipes(Path::new("nonesuch"), &fp8, false, &output).unwrap_err().to_string();
    assert!(error.contains("SM 9.0") && error.contains("--prepare") && error.contains("--finish"), "{error}");
    assert!(!output.exists());

    let summary = build_recipes(Path::new(TINY_CHAT), &fp8, true, &output).unwrap();
    assert!(summary.plans[0].only_prepared);
    assert!(summary.plans[0].compiler.as_ref().unwrap().contains("SM 8.9"));
    let package = open(&output);
    let info = plan(&package, "h100").tensorrt.as_ref().unwrap();
    assert_eq!((info.compute_capability, info.compiled.as_ref()), (90, None));
    assert!(plan(&package, "h100").plan.is_none());
    // Three linear layers per block are quantized; `qkv_proj` and the head stay in BF16.
    assert_eq!(info.activation_scales.len(), 3 * 5);
    assert!(info.activation_scales.values().all(|scale| *scale > 0.0));

    let request = FinishRequest { package: output.clone(), recipe: None };
    let error = finish(&request, &quiet()).unwrap_err().to_string();
    assert!(error.contains("SM 9.0"), "{error}");
    assert_eq!(digests(&open(&output)), digests(&package));
}

#[test]
fn plans_of_one_packing_share_its_file() {
    if rtx("plans_of_one_packing_share_its_file").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    let recipes = [("cpu", Precision::Bf16), ("a100", Precision::Bf16), ("h100", Precision::Bf16)];
    build_recipes(Path::new(TINY_CHAT), &recipes, true, &output).unwrap();
    let package = open(&output);
    assert_eq!(plan(&package, "a100").weights, plan(&package, "h100").weights);
    assert_ne!(plan(&package, "a100").weights, plan(&package, "cpu").weights);
    let weights = package.manifest().files.iter().filter(|file| file.path.starts_with("weights/"));
    assert_eq!(weights.count(), 2);

    let twice = [("a100", Precision::Bf16), ("a100", Precision::Int8)];
    let error =
        build_recipes(Path::new(TINY_CHAT), &twice, false, &folder.path().join("twice")).unwrap_err().to_string();
    assert!(error.contains("the second one for the target a100"), "{error}");
}

#[test]
fn a_package_is_compiled_again_from_its_own_weights() {
    if rtx("a_package_is_compiled_again_from_its_own_weights").is_none() {
        return;
    }
    for precision in [Precision::Int8, Precision::Int4] {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("engine");
        let recipes = [("cpu", Precision::Bf16), ("a100", precision)];
        build_recipes(Path::new(TINY_CHAT), &recipes, false, &output).unwrap();
        let before = open(&output);
        finish(&FinishRequest { package: output.clone(), recipe: None }, &quiet()).unwrap();
        let after = open(&output);
        assert_eq!(after.manifest().plans, before.manifest().plans);
        let unchanged = |package: &Package| {
            let mut files = digests(package);
            files.retain(|(name, _)| !name.ends_with(".engine"));
            files.sort();
            files
        };
        assert_eq!(unchanged(&after), unchanged(&before));

        let recipe = Recipe { slots: 3, prefill_chunk_tokens: 32, ..Recipe::load("a100").unwrap() };
        finish(&FinishRequest { package: output.clone(), recipe: Some(recipe) }, &quiet()).unwrap();
        let after = open(&output);
        let sizes = &plan(&after, "a100").tensorrt.as_ref().unwrap().sizes;
        assert_eq!((sizes.decode_sequences, sizes.prefill_tokens), (3, 32));
        assert_eq!(plan(&after, "a100").precision, precision.to_string());
        assert_eq!(unchanged(&after), unchanged(&before));
    }
}

#[test]
fn damaged_weights_do_not_become_part_of_a_plan() {
    if rtx("damaged_weights_do_not_become_part_of_a_plan").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    build_recipes(Path::new(TINY_CHAT), &[("a100", Precision::Int4)], false, &output).unwrap();
    let before = open(&output);
    let weights = output.join(&plan(&before, "a100").weights);
    let mut bytes = std::fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let error = finish(&FinishRequest { package: output.clone(), recipe: None }, &quiet()).unwrap_err().to_string();
    assert!(error.contains("weights/tensorrt-int4.safetensors does not match its digest"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left behind");
}

#[test]
fn a_package_without_gpu_weights_cannot_be_finished() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    build_recipes(Path::new(TINY_CHAT), &[("cpu", Precision::Bf16)], false, &output).unwrap();
    let error = finish(&FinishRequest { package: output, recipe: None }, &quiet()).unwrap_err().to_string();
    assert!(error.contains("no plan for a GPU") && error.contains("--recipe a100"), "{error}");
}

fn aotron(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aotron"));
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn the_program_builds_finishes_and_says_where_plans_run() {
    if rtx("the_program_builds_finishes_and_says_where_plans_run").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    let output = output.to_str().unwrap();
    let run = |arguments: &[&str]| {
        let done = aotron(arguments).output().unwrap();
        (done.status.code(), String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap())
    };
    let (code, text, errors) = run(&["build", TINY_CHAT, "--recipe", "a100:int8,h100", "--prepare", "-o", output]);
    assert_eq!(code, Some(0), "{errors}");
    assert!(text.contains("a100 in int8, h100 in fp8"), "{text}");
    assert!(text.contains("for SM 8.0") && text.contains("graph checked with"), "{text}");
    assert!(text.contains("the program and") && text.contains("libtensorrt_rtx.so.1 into one folder there"), "{text}");
    assert!(text.contains("on the H100: aotron build") && text.contains("--finish"), "{text}");

    let (code, _, errors) = run(&["build", output, "--finish"]);
    assert_eq!(code, Some(1));
    assert!(errors.contains("H100") && errors.contains("Copy the package"), "{errors}");
    assert!(!errors.contains("--prepare"), "it is prepared already: {errors}");
    let (code, text, errors) = run(&["build", output, "--finish", "--recipe", "a100"]);
    assert_eq!(code, Some(0), "{errors}");
    assert!(text.contains("for a100 in int8"), "{text}");
    // Flags of a build from a checkpoint do not apply to --finish.
    assert_eq!(run(&["build", output, "--finish", "--precision", "int4"]).0, Some(2));

    let (code, text, _) = run(&["inspect", output]);
    assert_eq!(code, Some(0));
    assert!(text.contains("h100 plan") && text.contains("only prepared"), "{text}");
    assert!(text.contains("by TensorRT for RTX 1.") && text.contains("for SM 8.0"), "{text}");
    assert!(text.contains(&format!("on a GPU of SM 9.0: aotron build {output} --finish")), "{text}");
    let (code, _, errors) = run(&["build", TINY_CHAT, "--recipe", "a100:fp8", "-o", output, "--force"]);
    assert_eq!(code, Some(1));
    assert!(errors.contains("fp8 is not for a100, which takes bf16, int8, int4, w8a8"), "{errors}");
}

#[test]
fn an_interrupted_build_leaves_nothing() {
    if rtx("an_interrupted_build_leaves_nothing").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("engine");
    let mut child = aotron(&["build", TINY_CHAT, "--recipe", "a100", "-o", output.to_str().unwrap()]).spawn().unwrap();
    // After the estimate of the build, a line reports that TensorRT is compiling.
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains("compiling a100") {
        assert!(errors.read_line(&mut said).unwrap() > 0, "{said}");
    }
    let interrupt = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(interrupt, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let mut rest = String::new();
    errors.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("error: cancelled"), "{rest}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
