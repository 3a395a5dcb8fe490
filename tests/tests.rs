//! The integration tests, but for those that need a process of their own: `hostile`, `allocation`, `tensorrt_memory`.

/// Tar archives for the tests below.
mod archives;
/// Chat formats of checkpoints, from the build to the answer.
mod chat_formats;
/// The program, as its users run it.
mod cli;
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
/// TensorRT, where its library is.
mod tensorrt;
/// Running plans of TensorRT, on a stand-in for a GPU and with the real library.
mod tensorrt_runtime;
/// What the networks for TensorRT compute.
mod tensorrt_semantics;
/// The 500 conversations of tiny-chat.
mod tiny_chat;
