//! `--finish` on fakes that compute the networks they are given (`fakes/evaluate.inl`): what it compiles is verified, and of
//! two ways to hold FP8 weights it keeps the faster that verifies.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use aotron::backend::tensorrt::{GpuOptions, TensorRtExecutor};
use aotron::backend::{Executor, NextToken, Step};
use aotron::compile::{BuildRequest, FinishRequest, Fp8Trials, Precision, Recipe, build, finish};
use aotron::engine::tensorrt::{Fp8Weights, LibraryKind};
use aotron::engine::{Package, PlanInfo};

use super::executor::{folder, run_in, stand_ins};
use crate::packages::quiet;
use crate::verify::grouped_checkpoint;

const H100: (&str, &str) = ("FAKE_GPU", "h100");
const COMPUTES: (&str, &str) = ("FAKE_COMPUTES", "1");

/// Writes a checkpoint of three layers for sequences of 128 tokens.
fn checkpoint(path: &Path) {
    grouped_checkpoint(path, 3);
    let config = std::fs::read_to_string(path.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["max_position_embeddings"] = 128.into();
    std::fs::write(path.join("config.json"), config.to_string()).unwrap();
}

/// The built-in recipe for an H100, in sizes that the fakes compute in seconds, with every linear layer in FP8.
fn recipe_text() -> String {
    let mut text = Recipe::load("h100").unwrap().text;
    for (from, to) in [
        ("keep_bf16 = [\"qkv_proj\"]", "keep_bf16 = []"),
        ("# weight_rounding = \"nearest\"", "weight_rounding = \"nearest\""),
        ("slots = 448", "slots = 12"),
        ("prefill_chunk_tokens = 1024", "prefill_chunk_tokens = 16"),
        ("logits_rows = 32", "logits_rows = 4"),
        ("capacity_classes = [256, 512, 1024, 2048]", "capacity_classes = [64]"),
        ("decode_batches = [2, 8, 32, 128]", "decode_batches = [2, 5]"),
    ] {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    text
}

/// A package of the checkpoint, whose plan was compiled as inputs.
fn package() -> PathBuf {
    let (source, output) = (folder().join("checkpoint"), folder().join("engines/engine"));
    checkpoint(&source);
    let request = BuildRequest {
        checkpoint: source,
        recipes: vec![Recipe::parse("small.toml", &recipe_text()).unwrap()],
        output: output.clone(),
        replace: false,
        prepare: false,
        calibration: None,
        chat_format: None,
        reference: true,
    };
    build(&request, &quiet()).unwrap();
    assert_eq!(kind_of(&plan(&output)), (Fp8Weights::Inputs, 2));
    output
}

fn plan(package: &Path) -> PlanInfo {
    let package = Package::open(package).unwrap();
    package.verify(&|_| {}).unwrap();
    package.manifest().plans[0].clone()
}

/// The way that a plan holds its weights, and its number of capacity classes.
fn kind_of(plan: &PlanInfo) -> (Fp8Weights, usize) {
    let info = plan.tensorrt.as_ref().unwrap();
    (info.fp8_weights(), info.class_sizes().len())
}

fn digests(package: &Path) -> Vec<(String, String)> {
    let package = Package::open(package).unwrap();
    package.manifest().files.iter().map(|file| (file.path.clone(), file.sha256.clone())).collect()
}

/// Names of everything in a folder, folders below it included.
fn contents(path: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        names.push(entry.file_name().into_string().unwrap());
        if entry.path().is_dir() {
            names.extend(contents(&entry.path()));
        }
    }
    names
}

/// Finishes the package and checks that it is whole, and that nothing else is left beside or in it.
fn finished(package: &Path) -> Fp8Trials {
    let request = FinishRequest { package: package.into(), recipe: None };
    let summary = finish(&request, &quiet()).unwrap();
    let mut expected: Vec<String> = digests(package)
        .into_iter()
        .map(|(path, _)| Path::new(&path).file_name().unwrap().to_str().unwrap().to_owned())
        .chain(["engine", "plans", "weights", "engine.json"].map(str::to_owned))
        .collect();
    let mut names = contents(package.parent().unwrap());
    expected.sort();
    names.sort();
    assert_eq!(names, expected);
    summary.plans[0].fp8_trials.clone().unwrap()
}

/// Decodes batches of several sizes with the plan of the package.
fn decode(package: &Path) {
    let package = Package::open(package).unwrap();
    let options = GpuOptions { slots: Some(12), ..GpuOptions::default() };
    let mut executor = TensorRtExecutor::open(&package, &package.manifest().plans[0], &options).unwrap();
    let limits = executor.limits().clone();
    for (past_tokens, batch) in [12, 11, 9, 4, 3, 3, 2, 1].into_iter().enumerate() {
        let next: Vec<NextToken> = (0..batch).map(|slot| NextToken { slot, past_tokens, token: 7 }).collect();
        executor.forward(&Step::decode(&limits, &next).unwrap()).unwrap();
    }
}

#[test]
fn the_faster_way_to_hold_weights_is_kept() {
    let text = run_in("fp8", "on_stand_ins_constants_are_faster", &[H100, COMPUTES, ("FAKE_SLOW", "inputs")]);
    // Timings of kernels go from plan to plan, and to the next build.
    assert!(text.contains("timings of 0 plans were taken") && text.contains("timings of 5 plans were taken"), "{text}");
    run_in("fp8", "on_stand_ins_inputs_are_faster", &[H100, COMPUTES, ("FAKE_SLOW", "constants"), ("FAKE_TELLS", "1")]);
}

#[test]
#[ignore = "run by the_faster_way_to_hold_weights_is_kept"]
fn on_stand_ins_constants_are_faster() {
    let package = package();
    let before = plan(&package);
    let found = finished(&package);
    assert_eq!((found.kept, found.gpu.as_str()), (Fp8Weights::Constants, "Fake H100-80GB"));
    let [inputs, constants] = &found.trials[..] else { panic!("{found:?}") };
    assert_eq!((inputs.kind, constants.kind), (Fp8Weights::Inputs, Fp8Weights::Constants));
    let ((rows, of_inputs), (_, of_constants)) = (inputs.outcome.clone().unwrap(), constants.outcome.clone().unwrap());
    assert!(rows > 100);
    assert_eq!((of_inputs.chunk_tokens, of_inputs.batch, of_constants.batch), (16, 12, 12));
    assert!(of_inputs.single_seconds > 0.005, "{of_inputs:?}");
    assert_eq!(found.relative(inputs), Some(1.0));
    assert!(found.relative(constants).unwrap() < 1.0);

    // Constants have one class and no context plan, and the file of weights is the same.
    let after = plan(&package);
    assert_eq!(kind_of(&after), (Fp8Weights::Constants, 1));
    assert_eq!((&after.weights, &after.recipe), (&before.weights, &before.recipe));
    let compiled = after.tensorrt.as_ref().unwrap().compiled.as_ref().unwrap();
    assert_eq!((compiled.library, compiled.context_plan.as_ref()), (LibraryKind::TensorRt, None));
    let weights = |files: Vec<(String, String)>| files.into_iter().find(|(path, _)| *path == after.weights).unwrap();
    let kept = weights(digests(&package));
    // Finished again, both are timed again.
    assert_eq!(finished(&package).kept, Fp8Weights::Constants);
    assert_eq!(weights(digests(&package)), kept);
    let timings: Vec<PathBuf> =
        std::fs::read_dir(folder().join("cache/aotron/timings")).unwrap().map(|entry| entry.unwrap().path()).collect();
    let [timings] = &timings[..] else { panic!("{timings:?}") };
    assert!(timings.ends_with("Fake-H100-80GB-11.4.0.timings"), "{timings:?}");
}

#[test]
#[ignore = "run by the_faster_way_to_hold_weights_is_kept"]
fn on_stand_ins_inputs_are_faster() {
    let package = package();
    let found = finished(&package);
    assert_eq!(found.kept, Fp8Weights::Inputs);
    assert!(found.relative(&found.trials[1]).unwrap() > 1.0, "{found:?}");
    assert_eq!(kind_of(&plan(&package)), (Fp8Weights::Inputs, 2));
}

/// TensorRT 11 selects kernels for each profile when it compiles, so each batch runs in the profile that is tuned for it.
#[test]
fn every_batch_decodes_in_its_profile() {
    let text = run_in("fp8", "on_stand_ins_batches_are_decoded", &[H100, COMPUTES, ("FAKE_TELLS", "1")]);
    let mut told: Vec<(usize, usize)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("decoded ")?.split_once(" in profile "))
        .map(|(batch, profile)| (batch.parse().unwrap(), profile.parse().unwrap()))
        .collect();
    told.sort_unstable();
    told.dedup(); // a context runs twice before it is captured
    assert_eq!(told, [(1, 1), (2, 1), (4, 2), (8, 3), (12, 3)]);
}

#[test]
#[ignore = "run by every_batch_decodes_in_its_profile"]
fn on_stand_ins_batches_are_decoded() {
    let package = package();
    let plan = plan(&package);
    assert_eq!(plan.tensorrt.unwrap().compiled.unwrap().decode_batches, [2, 5]);
    decode(&package);
}

#[test]
fn what_does_not_build_or_verify_is_not_kept() {
    let environment = |variable, kind| [H100, COMPUTES, ("FAKE_SLOW", "inputs"), (variable, kind)];
    run_in("fp8", "on_stand_ins_constants_are_wrong", &environment("FAKE_FAULT", "constants"));
    run_in("fp8", "on_stand_ins_constants_are_refused", &environment("FAKE_REFUSES", "constants"));
    run_in("fp8", "on_stand_ins_both_are_wrong", &environment("FAKE_FAULT", "any"));
}

/// The inputs are kept, slow as they are, and the reason is told.
fn inputs_are_kept(reason: &str) {
    let package = package();
    let found = finished(&package);
    assert_eq!(found.kept, Fp8Weights::Inputs);
    assert!(found.trials[0].outcome.is_ok(), "{found:?}");
    let words = found.trials[1].outcome.clone().unwrap_err();
    assert!(words.contains(reason), "{words}");
    assert_eq!(kind_of(&plan(&package)), (Fp8Weights::Inputs, 2));
}

#[test]
#[ignore = "run by what_does_not_build_or_verify_is_not_kept"]
fn on_stand_ins_constants_are_wrong() {
    inputs_are_kept("it gives wrong answers: the CPU's answers, prefilled: error");
}

#[test]
#[ignore = "run by what_does_not_build_or_verify_is_not_kept"]
fn on_stand_ins_constants_are_refused() {
    inputs_are_kept("the stand-in has no kernels for these weights");
}

#[test]
#[ignore = "run by what_does_not_build_or_verify_is_not_kept"]
fn on_stand_ins_both_are_wrong() {
    let package = package();
    let (before, names) = (digests(&package), contents(package.parent().unwrap()));
    let request = FinishRequest { package: package.clone(), recipe: None };
    let error = finish(&request, &quiet()).unwrap_err().to_string();
    for words in [
        "it is left as it is, since no plan for h100 that was compiled here can be used",
        "with FP8 weights as inputs: it gives wrong answers",
        "with FP8 weights as constants: it gives wrong answers",
    ] {
        assert!(error.contains(words), "{error}");
    }
    assert_eq!((digests(&package), contents(package.parent().unwrap())), (before, names));
}

/// Runs the program on the fakes.
fn aotron(arguments: &[&str], cache: &Path, environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_aotron"))
        .args(arguments)
        .env("LD_LIBRARY_PATH", stand_ins())
        .env("AOTRON_TENSORRT_DIR", stand_ins())
        .env("XDG_CACHE_HOME", cache)
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

#[test]
fn the_program_verifies_what_it_finishes_and_says_what_it_measured() {
    let root = tempfile::tempdir().unwrap();
    let (source, recipe) = (root.path().join("checkpoint"), root.path().join("small.toml"));
    checkpoint(&source);
    std::fs::write(&recipe, recipe_text()).unwrap();
    let cache = root.path().join("cache");
    let run = |arguments: &[&str], environment: &[(&str, &str)]| {
        let done = aotron(arguments, &cache, environment);
        (done.status.code(), String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap())
    };
    let (source, recipe) = (source.to_str().unwrap(), recipe.to_str().unwrap());

    // In BF16 there is nothing to choose: a right plan passes, and a wrong one is an error.
    let bf16 = root.path().join("bf16");
    let bf16 = bf16.to_str().unwrap();
    let small = format!("{recipe}:{}", Precision::Bf16);
    let (code, _, errors) = run(&["build", source, "--recipe", &small, "-o", bf16], &[H100, COMPUTES]);
    assert_eq!(code, Some(0), "{errors}");
    let (code, text, errors) = run(&["build", bf16, "--finish"], &[H100, COMPUTES]);
    assert_eq!(code, Some(0), "{errors}");
    assert!(text.contains("compiled with TensorRT 11.4.0 on GPU 1") && text.contains("passed"), "{text}");
    let (code, text, errors) = run(&["build", bf16, "--finish"], &[H100, COMPUTES, ("FAKE_FAULT", "any")]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("FAILED") && errors.contains("gives wrong answers on GPU 1"), "{text}{errors}");

    let fp8 = root.path().join("fp8");
    let fp8 = fp8.to_str().unwrap();
    let (code, _, errors) = run(&["build", source, "--recipe", recipe, "-o", fp8], &[H100, COMPUTES]);
    assert_eq!(code, Some(0), "{errors}");
    assert!(errors.contains("takes its FP8 weights as inputs") && errors.contains("--finish"), "{errors}");
    let environment = [H100, COMPUTES, ("FAKE_SLOW", "constants")];
    let (code, text, errors) = run(&["build", fp8, "--finish"], &environment);
    assert_eq!(code, Some(0), "{errors}");
    assert!(text.contains("FP8 weights of h100, timed on Fake H100-80GB (medians of 7); kept as inputs"), "{text}");
    let rows: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| matches!(words.first(), Some(&"inputs" | &"constants")))
        .collect();
    assert_eq!(rows.len(), 2, "{text}");
    assert_eq!((rows[0].last(), rows[1][0]), (Some(&"1.00"), "constants"), "{text}");
    assert!(rows[1].last().unwrap().parse::<f64>().unwrap() > 1.0, "{text}");
    assert!(text.contains("30 % by a step that decodes one sequence"), "{text}");
    // It was verified before it was kept, so it answers at once.
    let (code, _, errors) = run(&["build", fp8, "--finish"], &[H100, COMPUTES, ("FAKE_FAULT", "constants")]);
    assert_eq!(code, Some(0), "{errors}");
    assert!(errors.contains("plan h100 with FP8 weights as constants gives wrong answers"), "{errors}");
}
