//! The integration tests of the program and of GPU plans, which need both features. `library` needs neither; `hostile`
//! and `memory` are separate processes.

/// Tar archives for the tests below.
mod archives;
/// Chat formats of checkpoints, from building to the answer.
mod chat_formats;
/// The program as its users run it.
mod cli;
/// CPU plans packed for different CPUs.
mod cpu_packing;
/// Networks for TensorRT, evaluated on the CPU.
mod evaluator;
/// Packages with plans for GPUs.
mod gpu_packages;
/// A sequence's logits do not depend on its batch or its chunks.
mod invariance;
/// Builds killed at random moments.
mod kill;
/// Lowering to the CPU.
mod lowering;
/// Packages from `.nemo` files.
mod nemo;
/// Logits compared with transformers in FP32.
mod numerics;
/// Packages for the tests below.
mod packages;
/// Keys and values of sequences that have lost their slot.
mod prefix_cache;
/// Graphs evaluated in FP64.
mod reference;
/// Weights rounded by their layers' inputs.
mod rounding;
/// The HTTP server.
mod serve;
/// Tests that cannot run on every machine.
mod skips;
/// TensorRT, if its library is available.
mod tensorrt;
/// Running TensorRT plans, on a stand-in for a GPU and with the real library.
mod tensorrt_runtime;
/// Numerics of the networks for TensorRT.
mod tensorrt_semantics;
/// The 500 conversations of tiny-chat.
mod tiny_chat;
/// Verification of CPU plans.
mod verify;

use aotron::isa::{CPU_VARIABLE, CpuFeatures, Isa};

/// An unknown name in AOTRON_REQUIRE would silently require nothing.
#[test]
fn what_is_required_is_known() {
    for kind in skips::required() {
        assert!(skips::KINDS.contains(&kind.as_str()), "AOTRON_REQUIRE names {kind}; it knows {:?}", skips::KINDS);
    }
}

/// Most tests run on every instruction set of the machine; this reports the others.
#[test]
fn every_instruction_set_is_tested() {
    for set in CpuFeatures::names() {
        if Isa::by_name(set).is_none() {
            skips::skip(set, "every_instruction_set_is_tested", format!("this machine has no {set}"));
        }
    }
}

/// A test that chooses no instruction set itself uses the one in the environment.
#[test]
fn the_named_set_is_the_default() {
    if let Ok(name) = std::env::var(CPU_VARIABLE) {
        assert_eq!(Isa::from_environment().unwrap().to_string(), name);
    }
}
