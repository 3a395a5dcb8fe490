//! Machines that the fakes imitate: GPUs of different compute capabilities, and an old driver.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use aotron::backend::tensorrt::{
    GpuEvent, GpuOptions, GpuReport, LibraryKind, TensorRtExecutor, TensorRtLibrary, devices, driver_version,
};
use aotron::backend::{Executor, NextToken, Step};
use aotron::compile::Precision;
use aotron::engine::tensorrt::TimedOn;
use aotron::engine::{Package, PlanInfo};

use super::executor::{folder, run_in, stand_ins};
use crate::packages::build_recipes;

const TINY_CHAT: &str = "tests/data/tiny-chat";

fn plan_of(package: &Package) -> &PlanInfo {
    &package.manifest().plans[0]
}

/// Text of a plan of the fake libraries.
fn plan_text(package: &Package) -> String {
    String::from_utf8(package.read(plan_of(package).plan.as_ref().unwrap()).unwrap()).unwrap()
}

#[test]
fn plans_are_built_and_run_on_the_gpu_they_are_for() {
    run_in("machines", "on_stand_ins_plans_find_their_gpu", &[]);
}

/// GPU 0 is of SM 8.9, GPU 1 of SM 8.0. A library that builds for the current GPU must find the right one current, and so
/// must a plan that is read.
#[test]
#[ignore = "run by plans_are_built_and_run_on_the_gpu_they_are_for"]
fn on_stand_ins_plans_find_their_gpu() {
    let capabilities: Vec<u16> = devices().unwrap().iter().map(|gpu| gpu.compute_capability).collect();
    assert_eq!(capabilities, [89, 80]);
    let library = TensorRtLibrary::find(LibraryKind::TensorRt).unwrap();
    for gpu in [0, 1, 0] {
        library.compiles_on(gpu).unwrap();
    }
    let error = library.compiles_on(2).unwrap_err().to_string();
    assert!(error.contains("there is no GPU 2"), "{error}");

    // The last network above left GPU 0 current on this thread.
    let path = folder().join("a100");
    let summary = build_recipes(Path::new(TINY_CHAT), &[("a100", Precision::Bf16)], false, &path).unwrap();
    assert!(summary.plans[0].compiler.as_ref().unwrap().contains("on GPU 1"), "{summary:?}");
    let package = Package::open(&path).unwrap();
    let compiled = plan_of(&package).tensorrt.as_ref().unwrap().compiled.as_ref().unwrap();
    assert_eq!(compiled.library, LibraryKind::TensorRt);
    assert!(plan_text(&package).starts_with("sm 80\n"), "{}", plan_text(&package));

    let options = GpuOptions { slots: Some(2), ..GpuOptions::default() };
    let mut executor = TensorRtExecutor::open(&package, plan_of(&package), &options).unwrap();
    assert_eq!(executor.gpu().index, 1);
    let limits = executor.limits().clone();
    drop(executor.forward(&Step::decode(&limits, &[NextToken { slot: 0, past_tokens: 0, token: 5 }]).unwrap()));
    drop(executor);

    // The manifest has the GPU that the plan was timed on, and another one is said to be.
    assert_eq!(compiled.gpu, Some(TimedOn { name: "Fake A100-40GB".into(), memory_bytes: 42_400_000_000 }));
    let heard = Arc::new(Mutex::new(String::new()));
    let copy = heard.clone();
    let report = GpuReport::to(move |event| {
        if let GpuEvent::Fact(text) = event {
            copy.lock().unwrap().push_str(text);
        }
    });
    let options = GpuOptions { slots: Some(2), report, ..GpuOptions::default() };
    let mut elsewhere = plan_of(&package).clone();
    let other = TimedOn { name: "Fake A100-80GB".into(), memory_bytes: 85_000_000_000 };
    elsewhere.tensorrt.as_mut().unwrap().compiled.as_mut().unwrap().gpu = Some(other);
    let mut executor = TensorRtExecutor::open(&package, &elsewhere, &options).unwrap();
    let words = heard.lock().unwrap().clone();
    assert!(words.contains("compiled on Fake A100-80GB (85 GB)") && words.contains("--finish"), "{words}");

    // What the library says of a plan that it does not read comes with the versions and the remedy.
    let mut wrong = plan_of(&package).clone();
    wrong.tensorrt.as_mut().unwrap().compute_capability = 89;
    let error = TensorRtExecutor::open(&package, &wrong, &GpuOptions::default()).err().unwrap().to_string();
    assert!(
        error.contains("TensorRT 11.4.0 cannot read plans/a100-256.engine, which TensorRT 11.4.0 compiled: "),
        "{error}"
    );
    assert!(error.contains("the current GPU is SM 89") && error.contains("--finish` on this machine"), "{error}");

    let step = Step::decode(&limits, &[NextToken { slot: 0, past_tokens: 0, token: 5 }]).unwrap();
    executor.forward(&step).unwrap();
}

#[test]
fn an_old_driver_is_refused_with_the_one_that_is_needed() {
    run_in("machines", "on_stand_ins_the_driver_is_old", &[("FAKE_CUDA_VERSION", "12040")]);
}

#[test]
#[ignore = "run by an_old_driver_is_refused_with_the_one_that_is_needed"]
fn on_stand_ins_the_driver_is_old() {
    assert_eq!(driver_version().unwrap().cuda, (12, 4));
    let words = [
        "is built with CUDA 13 and needs an NVIDIA driver for it (580 or newer), but this machine has",
        "for CUDA 12.4",
        "Update the driver, or use the library for CUDA 12: ",
    ];
    let check = |error: String| assert!(words.iter().all(|part| error.contains(part)), "{error}");
    let library = TensorRtLibrary::find(LibraryKind::TensorRt).unwrap();
    check(library.compiles_on(1).unwrap_err().to_string());
    // Compiling for a named GPU needs no driver, so that TensorRT for RTX still builds.
    let path = folder().join("a100");
    let summary = build_recipes(Path::new(TINY_CHAT), &[("a100", Precision::Bf16)], false, &path).unwrap();
    assert!(summary.plans[0].compiler.as_ref().unwrap().contains("for SM 8.0"), "{summary:?}");
    let package = Package::open(&path).unwrap();
    let opened = TensorRtExecutor::open(&package, plan_of(&package), &GpuOptions::default());
    check(opened.err().unwrap().to_string());
}

#[test]
fn doctor_names_the_driver_and_what_each_library_needs() {
    let doctor = |version: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_aotron"))
            .arg("doctor")
            .env("LD_LIBRARY_PATH", stand_ins())
            .env("AOTRON_TENSORRT_DIR", stand_ins())
            .env("FAKE_CUDA_VERSION", version)
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let text = doctor("13000");
    assert!(text.contains("for CUDA 13.0"), "{text}");
    assert!(text.contains("compiles for GPU 0 (Fake L40), GPU 1 (Fake A100-40GB)"), "{text}");
    assert!(text.contains("a100 plans    builds here with TensorRT 11"), "{text}");
    let text = doctor("12040");
    assert!(text.contains("needs an NVIDIA driver for it (580 or newer)"), "{text}");
    assert!(text.contains("a100 plans    builds here with TensorRT for RTX"), "{text}");
    assert!(text.contains("an A100 is here, but its driver is too old to run them"), "{text}");
}
