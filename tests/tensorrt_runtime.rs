//! Execution of TensorRT plans: the errors of the real library without a GPU, and the executor on fakes of the driver
//! and the library (`fakes/`), which keep device memory on the host and execute stream work as late as possible.

use std::path::Path;
use std::sync::Arc;

use aotron::backend::tensorrt::{GpuOptions, TensorRtExecutor, Validity, devices};
use aotron::backend::{self, ExecutorOptions};
use aotron::compile::Precision;
use aotron::engine::Package;

use crate::packages::build_recipes;
use crate::skips::skip;
use crate::tensorrt::rtx;

#[path = "tensorrt_runtime/executor.rs"]
mod executor;
#[path = "tensorrt_runtime/faults.rs"]
mod faults;
#[path = "tensorrt_runtime/fp8.rs"]
mod fp8;
#[path = "tensorrt_runtime/machines.rs"]
mod machines;

/// A package with tiny-chat's A100 plan, and the plan's bytes.
fn tiny_chat(folder: &Path) -> (Package, Vec<u8>) {
    let path = folder.join("package");
    build_recipes(Path::new("tests/data/tiny-chat"), &[("a100", Precision::Bf16)], false, &path).unwrap();
    let package = Package::open(&path).unwrap();
    let plan = package.read(package.manifest().plans[0].plan.as_ref().unwrap()).unwrap();
    (package, plan)
}

/// On a machine with a GPU the intact plan may load; damaged ones never do.
#[test]
fn plans_that_are_not_whole_are_refused_in_words() {
    let Some(library) = rtx("plans_that_are_not_whole_are_refused_in_words") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (_, plan) = tiny_chat(folder.path());
    let runtime = library.runtime(Arc::new(())).unwrap();
    let refused = |bytes: &[u8]| runtime.deserialize(bytes).unwrap_err().to_string();

    let error = refused(&[]);
    assert!(error.starts_with("TensorRT: cannot read the plan: ") && error.contains("empty memory buffer"), "{error}");
    let error = refused(&plan[..10]);
    assert!(error.contains("readHeader"), "{error}");
    let error = refused(&plan[..plan.len() / 2]);
    assert!(error.contains("blobSize"), "{error}");
    let longer = [&plan[..], &[0; 64]].concat();
    assert!(refused(&longer).contains("blobSize"));
    let noise: Vec<u8> = (0..plan.len() as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let error = refused(&noise);
    assert!(error.contains("TRT engine file"), "{error}");
    assert!(!error.contains("cudaError 35"), "that there is no driver is beside the point: {error}");

    assert_eq!(runtime.validity(&[]), Validity::Unknown);
    assert_eq!(runtime.validity(&plan[..10]), Validity::Unknown);
    assert_eq!(runtime.validity(&noise), Validity::Invalid(vec!["it is not a plan, or it is damaged"]));
}

#[test]
fn without_a_driver_opening_says_so() {
    if devices().is_ok() {
        skip("no-driver", "without_a_driver_opening_says_so", "there is a driver");
        return;
    }
    let error = devices().unwrap_err().to_string();
    assert_eq!(error, "GPU: no NVIDIA driver is loaded: libcuda.so.1, which is part of it, cannot be opened");
    let Some(library) = rtx("without_a_driver_opening_says_so") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (package, plan) = tiny_chat(folder.path());
    let opened = TensorRtExecutor::open(&package, &package.manifest().plans[0], &GpuOptions::default());
    assert_eq!(opened.err().unwrap().to_string(), error);
    let error = backend::open(&package, &ExecutorOptions::default()).err().unwrap().to_string();
    assert!(
        error.contains("none of its plans can run here; plan a100 (bf16) cannot run: no NVIDIA driver is loaded"),
        "{error}"
    );
    // Creating a runtime still works, and the plan's check names the obstacle.
    let runtime = library.runtime(Arc::new(())).unwrap();
    let error = runtime.deserialize(&plan).unwrap_err().to_string();
    assert!(error.contains("cudaError 35"), "{error}");
    assert_eq!(runtime.validity(&plan), Validity::Invalid(Vec::new()));
    // On another thread than the runtime's creator, and after other use of the library.
    let (runtime, error) = std::thread::spawn(move || {
        let error = runtime.deserialize(&[]).unwrap_err().to_string();
        (runtime, error)
    })
    .join()
    .unwrap();
    assert!(error.contains("empty memory buffer"), "{error}");
    drop(library.network(Arc::new(())).unwrap());
    assert!(runtime.deserialize(&[1; 100]).is_err());
}
