//! Compiles the TensorRT shim (`cpp/`), once against the headers of each of the two libraries. Neither library is
//! needed to build or start the program: they are opened at run time.
//!
//! The headers come from the source of the crate `trtx-sys`, a dependency that cargo fetches but never compiles, unless
//! `TENSORRT_INCLUDE_DIR` (TensorRT 11) or `TENSORRT_RTX_INCLUDE_DIR` (TensorRT for RTX 1) names another folder.
//!
//! Without the feature `tensorrt` there is nothing to do.

#[cfg(feature = "tensorrt")]
mod shim {
    use std::env;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// Environment variable of the folder, folder in the crate, and macro of the include path in the shim.
    const HEADERS: [(&str, &str, &str); 2] = [
        ("TENSORRT_INCLUDE_DIR", "TRT-Enterprise-11.4", "AOTRON_TENSORRT_HEADER"),
        ("TENSORRT_RTX_INCLUDE_DIR", "TRT-RTX-1.7", "AOTRON_TENSORRT_RTX_HEADER"),
    ];
    const SOURCES: [&str; 3] = ["cpp/open.cpp", "cpp/tensorrt.cpp", "cpp/tensorrt_rtx.cpp"];

    pub fn build() -> Result<(), String> {
        for file in ["cpp", "build.rs", "src/backend/tensorrt/ffi.rs"] {
            println!("cargo::rerun-if-changed={file}");
        }
        let mut shim = cxx_build::bridge("src/backend/tensorrt/ffi.rs");
        let mut carried = None;
        for (variable, folder, header_macro) in HEADERS {
            println!("cargo::rerun-if-env-changed={variable}");
            let include = match env::var_os(variable) {
                Some(path) => PathBuf::from(path),
                None => {
                    if carried.is_none() {
                        carried = Some(carried_headers()?);
                    }
                    carried.iter().map(|headers| headers.join(folder)).collect()
                }
            };
            let header = include.join("NvInfer.h");
            if !header.is_file() {
                return Err(format!(
                    "{} does not exist; set {variable} to the folder that contains it",
                    header.display()
                ));
            }
            // An absolute path, since both sets of headers use the same file names; each finds its own neighbours
            // first.
            shim.define(header_macro, format!("\"{}\"", header.display()).as_str());
            // For the tests, which compile a fake library.
            println!("cargo::rustc-env={header_macro}={}", header.display());
        }
        shim.std("c++17")
            .include("cpp/cuda")
            .files(SOURCES)
            // For warnings in TensorRT's own headers.
            .flag_if_supported("-Wno-unused-parameter")
            .flag_if_supported("-Wno-deprecated-declarations")
            .try_compile("aotron_tensorrt")
            .map_err(|error| format!("the shim over TensorRT does not compile: {error}").replace('\n', " "))?;
        // Part of the C library since glibc 2.34.
        println!("cargo::rustc-link-lib=dl");
        Ok(())
    }

    /// Folder of the headers in the source of `trtx-sys`.
    fn carried_headers() -> Result<PathBuf, String> {
        let cargo = env::var_os("CARGO").ok_or("CARGO is not set: build with cargo")?;
        let root = env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set: build with cargo")?;
        let output = Command::new(cargo)
            .args(["metadata", "--format-version", "1", "--locked", "--manifest-path"])
            .arg(Path::new(&root).join("Cargo.toml"))
            .output()
            .map_err(|error| format!("cannot run cargo metadata: {error}"))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr).replace('\n', " ");
            return Err(format!("cargo metadata, which finds TensorRT's headers, failed: {words}"));
        }
        // Searched as text: a JSON parser as a build dependency would take longer to compile than the shim.
        let text = String::from_utf8_lossy(&output.stdout);
        let manifest = text
            .split("\"manifest_path\":\"")
            .skip(1)
            .filter_map(|rest| rest.split('"').next())
            .find(|path| path.contains("/trtx-sys-") || path.contains("/trtx-sys/"))
            .ok_or("cargo metadata does not list trtx-sys")?;
        let folder = Path::new(manifest).parent().ok_or("the manifest of trtx-sys has no folder")?;
        Ok(folder.join("TensorRT-Headers"))
    }
}

fn main() {
    // Rerun only if this file changes, unless the shim adds more files.
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "tensorrt")]
    {
        println!("cargo::rerun-if-env-changed=DOCS_RS");
        // docs.rs has no network and thus no headers, and documentation does not need the shim.
        if std::env::var_os("DOCS_RS").is_none()
            && let Err(message) = shim::build()
        {
            println!("cargo::error={message}");
        }
    }
}
