//! TensorRT's two libraries: their names, files and versions.

use std::fmt;

pub use crate::engine::tensorrt::LibraryKind;

impl LibraryKind {
    /// Both.
    pub const ALL: [LibraryKind; 2] = [LibraryKind::Rtx, LibraryKind::TensorRt];

    /// What NVIDIA calls it.
    pub fn name(self) -> &'static str {
        match self {
            LibraryKind::TensorRt => "TensorRT",
            LibraryKind::Rtx => "TensorRT for RTX",
        }
    }

    /// The library's file.
    pub fn file_name(self) -> &'static str {
        match self {
            LibraryKind::TensorRt => "libnvinfer.so.11",
            LibraryKind::Rtx => "libtensorrt_rtx.so.1",
        }
    }

    /// How to get it.
    pub fn remedy(self) -> &'static str {
        match self {
            LibraryKind::TensorRt => {
                "`pip install tensorrt-cu13` gets it from NVIDIA's package index; run aotron in the same Python \
                 environment, or set AOTRON_TENSORRT_DIR to the folder of the library"
            }
            LibraryKind::Rtx => {
                "`make tensorrt` in aotron's source folder downloads it (95 MB) to .tensorrt/; or `pip install \
                 tensorrt-rtx` and run aotron in the same Python environment; or set AOTRON_TENSORRT_DIR to the folder \
                 of the library"
            }
        }
    }
}

/// A version of a library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Programs compiled against another major version do not fit.
    pub major: u32,
    /// Functions are added from one to the next.
    pub minor: u32,
    /// Nothing is added.
    pub patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}
