//! GPU names and compute capabilities.

/// A GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Index among the GPUs visible to this process (see `CUDA_VISIBLE_DEVICES`).
    pub index: usize,
    /// NVIDIA's product name, such as "NVIDIA A100-SXM4-80GB".
    pub name: String,
    /// Compute capability as a number: 80 is SM 8.0.
    pub compute_capability: u16,
    /// Total device memory.
    pub memory_bytes: u64,
}

/// "SM 8.0 (A100)": a compute capability with well-known GPUs that have it.
pub(crate) fn gpu_words(compute_capability: u16) -> String {
    let known = match compute_capability {
        80 => " (A100)",
        86 => " (A40, RTX A6000)",
        89 => " (L4, L40)",
        90 => " (H100, H200)",
        100 => " (B200)",
        120 => " (RTX PRO 6000)",
        _ => "",
    };
    format!("SM {}.{}{known}", compute_capability / 10, compute_capability % 10)
}
