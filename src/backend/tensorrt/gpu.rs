//! GPU names and compute capabilities, and driver versions.

use std::fmt;

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

/// Version of the NVIDIA driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DriverVersion {
    /// The newest CUDA version it serves, major and minor.
    pub cuda: (u32, u32),
    /// Release, such as "580.65.06", where the system tells.
    pub release: Option<String>,
}

impl DriverVersion {
    /// The release in the words of `/proc/driver/nvidia/version`.
    #[cfg(feature = "tensorrt")]
    pub(super) fn release_in(text: &str) -> Option<String> {
        let line = text.lines().find(|line| line.contains("Kernel Module"))?;
        let is_release = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
        line.split_whitespace().find(is_release).map(str::to_owned)
    }
}

impl fmt::Display for DriverVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.cuda;
        match &self.release {
            Some(release) => write!(f, "driver {release} for CUDA {major}.{minor}"),
            None => write!(f, "a driver for CUDA {major}.{minor}"),
        }
    }
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

#[cfg(all(test, feature = "tensorrt"))]
mod tests {
    use super::*;

    #[test]
    fn the_release_of_either_kernel_module_is_read() {
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12.2.0";
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)";
        assert_eq!(DriverVersion::release_in(closed).as_deref(), Some("550.54.15"));
        assert_eq!(DriverVersion::release_in(open).as_deref(), Some("580.65.06"));
        assert_eq!(DriverVersion::release_in("GCC version: 12.2.0"), None);
    }
}
