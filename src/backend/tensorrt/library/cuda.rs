//! The CUDA version that a library was built with, and the NVIDIA driver that it therefore needs.
//!
//! Libraries of one CUDA major version run on every driver of that major version or a later one ("CUDA minor version
//! compatibility"), so only the major version is compared.

use std::path::Path;

use super::super::{DriverVersion, LibraryKind};
use crate::mmap::MappedFile;

/// Follows the major and minor version of CUDA, as in `#define CUDART_VERSION 13040`, in the sources that the library
/// carries for the kernels it compiles at run time.
const MARK: &[u8] = b"#define CUDART_VERSION ";

/// CUDA's major version that the library at `path` was built with: from the name of the wheel it was installed from, or
/// from its content. `None` if neither says.
pub(super) fn built_with(path: &Path) -> Option<u32> {
    of_wheel(path).or_else(|| {
        // SAFETY: TensorRT's library is open and mapped by the dynamic loader already, which relies on the same.
        #[allow(unsafe_code)]
        let file = unsafe { MappedFile::open(path) }.ok()?;
        of_content(file.bytes())
    })
}

/// From a neighbour of the library's folder such as `tensorrt_rtx_cu13_libs-1.7.1.116.dist-info`.
fn of_wheel(path: &Path) -> Option<u32> {
    let packages = path.parent()?.parent()?;
    let folder = path.parent()?.file_name()?.to_str()?;
    let prefix = format!("{}_cu", folder.strip_suffix("_libs")?);
    let major = |name: &str| name.strip_suffix(".dist-info")?.strip_prefix(&prefix)?.get(..2)?.parse().ok();
    std::fs::read_dir(packages).ok()?.find_map(|entry| major(entry.ok()?.file_name().to_str()?))
}

fn of_content(bytes: &[u8]) -> Option<u32> {
    let digits = bytes.get(find(bytes, MARK)? + MARK.len()..)?;
    let digits = &digits[..digits.iter().position(|c| !c.is_ascii_digit()).unwrap_or(digits.len()).min(9)];
    std::str::from_utf8(digits).ok()?.parse::<u32>().ok().map(|version| version / 1000)
}

/// Position of the first occurrence, by the Boyer-Moore-Horspool algorithm: libraries have hundreds of megabytes.
fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let last = wanted.len().checked_sub(1)?;
    let mut skip = [wanted.len(); 256];
    for (index, byte) in wanted[..last].iter().enumerate() {
        skip[usize::from(*byte)] = last - index;
    }
    let mut at = 0;
    while let Some(window) = bytes.get(at..at + wanted.len()) {
        if window == wanted {
            return Some(at);
        }
        at += skip[usize::from(window[last])];
    }
    None
}

/// The oldest driver release for a major version of CUDA, from NVIDIA's table of CUDA compatibility.
fn oldest_driver(major: u32) -> Option<&'static str> {
    match major {
        12 => Some("525"),
        13 => Some("580"),
        _ => None,
    }
}

/// The reason why a driver cannot serve a library built with CUDA `built`, and the remedy; `None` if it can.
pub(super) fn problem(kind: LibraryKind, name: &str, built: Option<u32>, driver: &DriverVersion) -> Option<String> {
    let built = built.filter(|built| *built > driver.cuda.0)?;
    let oldest = oldest_driver(built).map(|release| format!(" ({release} or newer)")).unwrap_or_default();
    Some(format!(
        "{name} is built with CUDA {built} and needs an NVIDIA driver for it{oldest}, but this machine has {driver}. {}",
        remedy(kind, driver)
    ))
}

/// What to do about a driver that is too old.
pub(super) fn remedy(kind: LibraryKind, driver: &DriverVersion) -> String {
    let older = driver.cuda.0;
    let package = match kind {
        LibraryKind::TensorRt => format!("`pip install tensorrt-cu{older}` in place of the one installed"),
        LibraryKind::Rtx => format!("run `make tensorrt CUDA={older}` in aotron's source folder"),
    };
    format!("Update the driver, or use the library for CUDA {older}: {package}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_cuda_is_read_from_the_wheel_or_the_content() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("tensorrt_rtx_libs");
        std::fs::create_dir(&folder).unwrap();
        let file = folder.join("libtensorrt_rtx.so.1");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        write("nothing that says");
        assert_eq!(built_with(&file), None);
        write("#if CUDART_VERSION >= 12080 ## #define CUDART_VERSION 13040\n");
        assert_eq!(built_with(&file), Some(13));
        write("#define CUDART_VERSION 12");
        assert_eq!(built_with(&file), Some(0));
        write("#define CUDART_VERSION ");
        assert_eq!(built_with(&file), None);
        std::fs::create_dir(root.path().join("tensorrt_cu13_libs-11.4.0.dist-info")).unwrap();
        assert_eq!(built_with(&file), None);
        std::fs::create_dir(root.path().join("tensorrt_rtx_cu12_libs-1.7.1.116.dist-info")).unwrap();
        assert_eq!(built_with(&file), Some(12));
        assert_eq!(built_with(Path::new("/")), None);
    }

    #[test]
    fn text_is_found_wherever_it_is() {
        let text: Vec<u8> = (0..200u8).cycle().take(1000).collect();
        for length in [1, 2, 7, 200] {
            assert_eq!(find(&text, &text[150..150 + length]), Some(150), "{length}");
        }
        assert_eq!(find(&text, &[5, 7]), None);
        assert_eq!(find(&[], &[1]), None);
        assert_eq!(find(&text[..3], &text[..4]), None);
    }

    #[test]
    fn an_old_driver_is_named_with_the_one_that_is_needed() {
        let driver = DriverVersion { cuda: (12, 4), release: Some("550.54.15".into()) };
        let words = |kind, built| problem(kind, "the library", Some(built), &driver);
        assert_eq!(
            words(LibraryKind::Rtx, 13).unwrap(),
            "the library is built with CUDA 13 and needs an NVIDIA driver for it (580 or newer), but this machine has \
             driver 550.54.15 for CUDA 12.4. Update the driver, or use the library for CUDA 12: run `make tensorrt \
             CUDA=12` in aotron's source folder"
        );
        assert!(words(LibraryKind::TensorRt, 13).unwrap().contains("`pip install tensorrt-cu12`"));
        assert_eq!(words(LibraryKind::Rtx, 12), None);
        assert_eq!(problem(LibraryKind::Rtx, "the library", None, &driver), None);
    }
}
