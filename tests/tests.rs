//! The integration tests, of the program and of GPU plans: they need both features. `library`
//! needs neither; `hostile` and `memory` are processes of their own.

/// Tar archives for the tests below.
mod archives;
/// Chat formats of checkpoints, from the build to the answer.
mod chat_formats;
/// The program, as its users run it.
mod cli;
/// CPU plans for one CPU and another.
mod cpu_packing;
/// Networks for TensorRT, computed on the CPU.
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
/// Logits against transformers in FP32.
mod numerics;
/// Packages for the tests below.
mod packages;
/// Graphs computed in FP64.
mod reference;
/// Tests that this machine cannot run.
mod skips;
/// TensorRT, where its library is.
mod tensorrt;
/// Running plans of TensorRT, on a stand-in for a GPU and with the real library.
mod tensorrt_runtime;
/// What the networks for TensorRT compute.
mod tensorrt_semantics;
/// The 500 conversations of tiny-chat.
mod tiny_chat;

use aotron::isa::{CPU_VARIABLE, CpuFeatures, Isa};

/// A word that nothing may do without would require nothing, in silence.
#[test]
fn what_is_required_is_known() {
    for kind in skips::required() {
        assert!(skips::KINDS.contains(&kind.as_str()), "AOTRON_REQUIRE names {kind}; it knows {:?}", skips::KINDS);
    }
}

/// Most tests run on every set that a machine has: here the others are named.
#[test]
fn every_instruction_set_is_tested() {
    for set in CpuFeatures::names() {
        if Isa::by_name(set).is_none() {
            skips::skip(set, "every_instruction_set_is_tested", format!("this machine has no {set}"));
        }
    }
}

/// A test that names no set itself runs on the one that the environment names.
#[test]
fn the_named_set_is_the_default() {
    if let Ok(name) = std::env::var(CPU_VARIABLE) {
        assert_eq!(Isa::from_environment().unwrap().to_string(), name);
    }
}
