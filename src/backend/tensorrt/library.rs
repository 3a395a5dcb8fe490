//! Discovery and loading of TensorRT's libraries.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::device::Device;
use super::ffi::{Observer, bridge};
use super::{BuildOptions, Layers, LibraryKind, Monitor, Network, Version, driver_version};
use crate::error::{Error, Result};
use crate::tensor::DType;

mod cuda;

/// CUDA's major version that the newest builds of these libraries use.
const NEWEST_CUDA: u32 = 13;

/// Version of the headers this program was compiled against.
fn header_version(kind: LibraryKind) -> Version {
    Version::from_number(bridge::header_version(kind == LibraryKind::Rtx))
}

impl LibraryKind {
    /// Version of the headers this program was compiled against; `None` without the feature `tensorrt`.
    pub fn header_version(self) -> Option<Version> {
        Some(header_version(self))
    }

    /// Folder of the Python package under site-packages.
    fn python_package(self) -> &'static str {
        match self {
            LibraryKind::TensorRt => "tensorrt_libs",
            LibraryKind::Rtx => "tensorrt_rtx_libs",
        }
    }
}

impl Version {
    /// Decodes TensorRT's version number, which has two decimal digits each for minor and patch.
    fn from_number(number: i32) -> Version {
        let number = u32::try_from(number).unwrap_or(0);
        Version { major: number / 10000, minor: number / 100 % 100, patch: number % 100 }
    }

    /// Returns true if a program compiled against `headers` can call a library of this version: within a major version,
    /// virtual tables only grow.
    fn serves(self, headers: Version) -> bool {
        self.major == headers.major && self.minor >= headers.minor
    }
}

/// An open library. It stays open until the process ends, because TensorRT cannot be unloaded safely, so nothing
/// created from it can outlive it.
#[derive(Clone, Copy)]
pub struct TensorRtLibrary {
    kind: LibraryKind,
    version: Version,
    inner: &'static bridge::Library,
}

impl fmt::Debug for TensorRtLibrary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorRtLibrary({} {} at {})", self.kind.name(), self.version, self.path().display())
    }
}

impl TensorRtLibrary {
    /// Opens the first library found:
    ///
    /// 1. in the folder `AOTRON_TENSORRT_DIR`;
    /// 2. in the folder of the program, and in `tensorrt` in that folder;
    /// 3. in `aotron/tensorrt` in the user's data folder (`XDG_DATA_HOME`, by default `~/.local/share`), where `make
    ///    tensorrt` puts it;
    /// 4. on the system's library search path;
    /// 5. in the active Python environment.
    ///
    /// The current folder is not among them: a library is code, and anyone may have written what is there. A library
    /// that is found but unusable is an error; the search does not continue.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with the places searched and installation instructions, or with the problem of the one
    /// found.
    pub fn find(kind: LibraryKind) -> Result<TensorRtLibrary> {
        Surroundings::of_this_process().find(kind)
    }

    /// Opens a library by its path.
    ///
    /// # Safety
    /// Opening runs the library's initializers, and later calls run its code: the file must be the TensorRT library
    /// that `kind` names.
    ///
    /// # Errors
    /// [`Error::TensorRt`] if the file is not a library, a different library, or a version incompatible with the
    /// headers.
    #[allow(unsafe_code)]
    pub unsafe fn open(kind: LibraryKind, path: &Path) -> Result<TensorRtLibrary> {
        let refuse =
            |detail: String| Error::TensorRt(format!("cannot use {} as {}: {detail}", path.display(), kind.name()));
        let inner = bridge::open_library(kind == LibraryKind::Rtx, path.as_os_str().as_bytes())
            .map_err(|error| refuse(error.what().into()))?;
        let version = Version::from_number(inner.version());
        let headers = header_version(kind);
        if !version.serves(headers) {
            return Err(refuse(format!(
                "it is version {version}, and this aotron needs {}.{} or a later {}.x; {}",
                headers.major,
                headers.minor,
                headers.major,
                kind.remedy()
            )));
        }
        Ok(TensorRtLibrary { kind, version, inner })
    }

    pub(super) fn inner(&self) -> &'static bridge::Library {
        self.inner
    }

    /// The kind of library.
    pub fn kind(&self) -> LibraryKind {
        self.kind
    }

    /// Version that the library reports.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Path of the file the library was opened from.
    pub fn path(&self) -> PathBuf {
        OsString::from_vec(self.inner.path()).into()
    }

    /// Checks that this machine's NVIDIA driver serves the CUDA version that the library was built with. Without a
    /// driver or a GPU there is nothing to check.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with the driver found, the driver needed, and the remedy.
    pub fn check_driver(&self) -> Result<()> {
        let Ok(driver) = driver_version() else { return Ok(()) };
        // Every library whose headers this program knows runs with a driver for the newest CUDA it knows.
        if driver.cuda.0 >= NEWEST_CUDA {
            return Ok(());
        }
        let path = self.path();
        let name = format!("{} {} at {}", self.kind.name(), self.version, path.display());
        match cuda::problem(self.kind, &name, cuda::built_with(&path), &driver) {
            Some(words) => Err(Error::TensorRt(words)),
            None => Ok(()),
        }
    }

    /// An error in TensorRT's words. CUDA's error 35 with a driver means that the driver is older than the library
    /// needs; the remedy is added.
    pub(super) fn refused(&self, error: &cxx::Exception) -> Error {
        let mut words = error.what().to_owned();
        if (words.contains("cudaError 35") || words.contains("error: 35"))
            && let Ok(driver) = driver_version()
        {
            words += &format!(". This machine's {driver} is too old for it. {}", cuda::remedy(self.kind, &driver));
        }
        Error::TensorRt(words)
    }

    /// Checks that the library can compile for a GPU of this compute capability by compiling one linear layer; `None` is
    /// the first GPU in this machine.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message if it cannot.
    pub fn compiles_for(&self, compute_capability: Option<u16>) -> Result<()> {
        self.try_out(None, compute_capability)
    }

    /// Checks that the library can compile for the GPU of this index in this machine.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message if it cannot, [`Error::Gpu`] if there is no such GPU.
    pub fn compiles_on(&self, gpu: usize) -> Result<()> {
        self.try_out(Some(gpu), None)
    }

    fn try_out(&self, gpu: Option<usize>, compute_capability: Option<u16>) -> Result<()> {
        let mut network = self.network_on(gpu, Arc::new(()))?;
        let x = network.input("x", DType::BF16, &[8, 64])?;
        let weight = network.input("weight", DType::BF16, &[64, 64])?;
        let product = network.linear(x, weight)?;
        network.output(product, "product")?;
        network.build(&BuildOptions { compute_capability, ..BuildOptions::default() }).map(drop)
    }

    /// Creates an empty network. The monitor receives what TensorRT logs on this thread while the network lives, and
    /// the progress of its build. Lines from TensorRT's own threads go to all live networks, since the library has one
    /// logger.
    ///
    /// # Errors
    /// [`Error::TensorRt`] with TensorRT's message.
    pub fn network(&self, monitor: Arc<dyn Monitor>) -> Result<Network> {
        self.network_on(None, monitor)
    }

    /// As [`TensorRtLibrary::network`], built on the GPU of this index, which becomes this thread's current one: a
    /// build without a named compute capability is for the current GPU, which otherwise is the first.
    ///
    /// # Errors
    /// As [`TensorRtLibrary::network`], and [`Error::Gpu`] if there is no such GPU. With one, the driver is checked first
    /// ([`TensorRtLibrary::check_driver`]).
    pub fn network_on(&self, gpu: Option<usize>, monitor: Arc<dyn Monitor>) -> Result<Network> {
        let device = gpu.map(|gpu| self.check_driver().and_then(|()| Device::open(gpu))).transpose()?;
        let inner = self.inner.network(Box::new(Observer(monitor))).map_err(|error| self.refused(&error))?;
        Ok(Network::new(inner, *self, device))
    }
}

/// The places to search for libraries.
#[derive(Debug, Clone, Default)]
struct Surroundings {
    /// Folders that may contain a library, in order of preference.
    folders: Vec<PathBuf>,
    /// Searches the system's library path.
    system: bool,
    /// Roots of active Python environments.
    python: Vec<PathBuf>,
}

impl Surroundings {
    fn of_this_process() -> Surroundings {
        Surroundings::of(&|name| env::var_os(name), env::current_exe().ok().as_deref())
    }

    /// The places for a program at `program` with the environment that `variable` looks up. Paths that other programs
    /// set count only if they are absolute, since a relative one would be found in the current folder.
    fn of(variable: &dyn Fn(&str) -> Option<OsString>, program: Option<&Path>) -> Surroundings {
        let folder = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let absolute = |name: &str| folder(name).filter(|path| path.is_absolute());
        let beside = program.and_then(Path::parent);
        let data = absolute("XDG_DATA_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/share")));
        let folders = [
            folder("AOTRON_TENSORRT_DIR"),
            beside.map(Path::to_path_buf),
            beside.map(|beside| beside.join("tensorrt")),
            data.map(|data| data.join("aotron").join("tensorrt")),
        ];
        Surroundings {
            folders: folders.into_iter().flatten().collect(),
            system: true,
            python: ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(absolute).collect(),
        }
    }

    fn find(&self, kind: LibraryKind) -> Result<TensorRtLibrary> {
        // SAFETY: these are the places where the user, the system or the Python environment installs TensorRT; as with
        // any dynamically linked program, whoever can replace the library there controls what runs.
        #[allow(unsafe_code)]
        let open = |path: &Path| unsafe { TensorRtLibrary::open(kind, path) };
        let mut in_folders = self.folders.iter().map(|folder| folder.join(kind.file_name()));
        if let Some(path) = in_folders.find(|path| path.exists()) {
            return open(&path);
        }
        // The system searches for a name without a slash. Its error ("cannot open shared object file") is dropped, as
        // it says no more than that nothing was found, and the search goes on.
        let name = Path::new(kind.file_name());
        if self.system && bridge::open_library(kind == LibraryKind::Rtx, name.as_os_str().as_bytes()).is_ok() {
            return open(name);
        }
        if let Some(path) = self.python.iter().flat_map(|root| python_libraries(root, kind)).next() {
            return open(&path);
        }
        let mut places: Vec<String> = self.folders.iter().map(|folder| folder.display().to_string()).collect();
        if self.system {
            places.push("the system's library path".into());
        }
        if self.python.is_empty() {
            places.push("a Python environment (none is active)".into());
        }
        places.extend(self.python.iter().map(|root| format!("the Python environment {}", root.display())));
        Err(Error::TensorRt(format!(
            "{} ({}) is not installed. {}. Looked in: {}",
            kind.name(),
            kind.file_name(),
            capitalized(kind.remedy()),
            places.join(", ")
        )))
    }
}

/// The existing files among `<root>/lib/python3.*/site-packages/<package>/<library>`.
fn python_libraries(root: &Path, kind: LibraryKind) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root.join("lib")) else { return Vec::new() };
    let is_python = |name: &OsStr| name.as_bytes().starts_with(b"python");
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(is_python))
        .map(|path| path.join("site-packages").join(kind.python_package()).join(kind.file_name()))
        .filter(|path| path.exists())
        .collect();
    paths.sort_unstable();
    paths
}

fn capitalized(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map(|first| first.to_uppercase().chain(characters).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_is_said_to_be_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let nowhere = Surroundings { folders: vec![folder.path().into()], ..Surroundings::default() };
        for kind in LibraryKind::ALL {
            let error = nowhere.find(kind).unwrap_err().to_string();
            assert!(error.starts_with(&format!("TensorRT: {} ({}) is not", kind.name(), kind.file_name())), "{error}");
            assert!(error.contains("pip install tensorrt") && error.contains("AOTRON_TENSORRT_DIR"), "{error}");
            assert!(error.contains(&folder.path().display().to_string()), "{error}");
        }
    }

    /// None of the files is a library, so the error names the one that was tried.
    #[test]
    fn places_are_searched_in_order() {
        let root = tempfile::tempdir().unwrap();
        let name = LibraryKind::Rtx.file_name();
        let place = |folder: &str| {
            std::fs::create_dir_all(root.path().join(folder)).unwrap();
            root.path().join(folder).join(name)
        };
        let places = [
            place("chosen"),
            place("bin"),
            place("bin/tensorrt"),
            place("home/.local/share/aotron/tensorrt"),
            place("python/lib/python3.11/site-packages/tensorrt_rtx_libs"),
        ];
        let variable = |name: &str| {
            let folder = match name {
                "AOTRON_TENSORRT_DIR" => "chosen",
                "HOME" => "home",
                "VIRTUAL_ENV" => "python",
                _ => return None,
            };
            Some(root.path().join(folder).into())
        };
        let program = root.path().join("bin/aotron");
        let surroundings = Surroundings { system: false, ..Surroundings::of(&variable, Some(&program)) };
        for place in places.iter().rev() {
            std::fs::write(place, "no library").unwrap();
            let error = surroundings.find(LibraryKind::Rtx).unwrap_err().to_string();
            assert!(error.starts_with(&format!("TensorRT: cannot use {} as", place.display())), "{error}");
        }
    }

    #[test]
    fn only_the_user_can_name_the_current_folder() {
        let relative = |name: &str| Some(if name == "AOTRON_TENSORRT_DIR" { "mine" } else { "." }.into());
        let found = Surroundings::of(&relative, None);
        assert_eq!(found.folders, [Path::new("mine")]);
        assert!(found.python.is_empty());
        let none = Surroundings::of(&|_| None, Some(Path::new("/opt/aotron/aotron")));
        assert_eq!(none.folders, [Path::new("/opt/aotron"), Path::new("/opt/aotron/tensorrt")]);
        let data = |name: &str| (name == "XDG_DATA_HOME").then(|| "/data".into());
        assert_eq!(Surroundings::of(&data, None).folders, [Path::new("/data/aotron/tensorrt")]);
    }

    #[test]
    fn later_versions_of_one_major_serve() {
        let version = |major, minor, patch| Version { major, minor, patch };
        assert_eq!(Version::from_number(110406), version(11, 4, 6));
        assert_eq!(Version::from_number(-1), version(0, 0, 0));
        assert_eq!(header_version(LibraryKind::TensorRt).major, 11);
        assert_eq!(header_version(LibraryKind::Rtx).major, 1);
        assert!(version(11, 5, 0).serves(version(11, 4, 2)));
        assert!(version(11, 4, 0).serves(version(11, 4, 2)));
        assert!(!version(11, 3, 9).serves(version(11, 4, 0)));
        assert!(!version(12, 4, 0).serves(version(11, 4, 0)));
    }
}
