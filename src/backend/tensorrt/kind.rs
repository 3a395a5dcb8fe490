//! Names, files and versions of TensorRT's two libraries.

use std::fmt;

pub use crate::engine::tensorrt::LibraryKind;

impl LibraryKind {
    /// Both libraries, in the order they are listed to users.
    pub const ALL: [LibraryKind; 2] = [LibraryKind::Rtx, LibraryKind::TensorRt];

    /// NVIDIA's name for the library.
    pub fn name(self) -> &'static str {
        match self {
            LibraryKind::TensorRt => "TensorRT",
            LibraryKind::Rtx => "TensorRT for RTX",
        }
    }

    /// File name of the shared library.
    pub fn file_name(self) -> &'static str {
        match self {
            LibraryKind::TensorRt => "libnvinfer.so.11",
            LibraryKind::Rtx => "libtensorrt_rtx.so.1",
        }
    }

    /// Installation instructions, for error messages.
    pub fn remedy(self) -> &'static str {
        match self {
            LibraryKind::TensorRt => {
                "install it with `pip install tensorrt-cu13` (from NVIDIA's package index) and run aotron in the same \
                 environment, or set AOTRON_TENSORRT_DIR to the folder that contains the library"
            }
            LibraryKind::Rtx => {
                "run `make tensorrt` in aotron's source folder, which downloads it (95 MB) to your data folder; or \
                 copy the library into the program's folder; or `pip install tensorrt-rtx` and run aotron in the same \
                 Python environment; or set AOTRON_TENSORRT_DIR to the folder that contains the library"
            }
        }
    }
}

/// Version of a TensorRT library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The ABI is compatible only within a major version.
    pub major: u32,
    /// A later minor version may add functions.
    pub minor: u32,
    /// Fixes only.
    pub patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}
