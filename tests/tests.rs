//! The integration tests, but for those that need a process of their own: `hostile`, `allocation`, `tensorrt_memory`.

/// Tar archives for the tests below.
#[cfg(feature = "cli")]
mod archives;
/// The program, as its users run it.
#[cfg(feature = "cli")]
mod cli;
/// Networks for TensorRT, computed on the CPU.
#[cfg(feature = "cli")]
mod evaluator;
/// The programs in `examples/`, and the library as they use it.
mod examples;
/// Packages with plans for GPUs.
#[cfg(all(feature = "cli", feature = "tensorrt"))]
mod gpu_packages;
/// A sequence's logits do not depend on its batch or its chunks.
mod invariance;
/// Builds killed at random moments.
#[cfg(feature = "cli")]
mod kill;
/// Lowering to the CPU.
mod lowering;
/// Packages from `.nemo` files.
#[cfg(feature = "cli")]
mod nemo;
/// Logits against transformers in FP32.
#[cfg(feature = "cli")]
mod numerics;
/// Packages for the tests below.
mod packages;
/// TensorRT, where its library is.
#[cfg(all(feature = "cli", feature = "tensorrt"))]
mod tensorrt;
/// Running plans of TensorRT, on a stand-in for a GPU and with the real library.
#[cfg(feature = "tensorrt")]
mod tensorrt_runtime;
/// What the networks for TensorRT compute.
#[cfg(feature = "cli")]
mod tensorrt_semantics;
/// The 500 conversations of tiny-chat.
mod tiny_chat;
