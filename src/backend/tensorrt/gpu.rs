//! GPUs by name and number.

/// A GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number among those this process may use (`CUDA_VISIBLE_DEVICES` decides which).
    pub index: usize,
    /// What NVIDIA calls it: "NVIDIA A100-SXM4-80GB".
    pub name: String,
    /// 80 is SM 8.0.
    pub compute_capability: u16,
    /// Its memory.
    pub memory_bytes: u64,
}

/// GPUs by their compute capability, to name them.
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
