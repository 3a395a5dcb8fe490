//! Driver initialization, GPU enumeration, and driver errors as text.

use std::sync::OnceLock;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUresult};

use crate::backend::tensorrt::{DeviceInfo, DriverVersion};
use crate::error::{Error, Result};

/// Every driver function this module calls. The bindings abort the process on a missing symbol, so all of them are
/// looked up before the first call.
const FUNCTIONS: [&str; 34] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemsetD8Async",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamIsCapturing",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventDestroy_v2",
    "cuGraphInstantiateWithFlags",
    "cuGraphDestroy",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
];

/// Lists the GPUs visible to this process; empty if a driver is loaded but finds none.
///
/// # Errors
/// [`Error::Gpu`] if there is no driver, or it fails to initialize.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    match start_driver() {
        Ok(()) => {}
        Err(Start::NoDevice) => return Ok(Vec::new()),
        Err(Start::Failed(detail)) => return Err(Error::Gpu(detail)),
    }
    let count = result::device::get_count().map_err(|error| Error::Gpu(words("count the GPUs", error)))?;
    (0..usize::try_from(count).unwrap_or(0)).map(info).collect()
}

/// Version of the driver.
///
/// # Errors
/// [`Error::Gpu`] if there is no driver, or it fails to initialize or finds no GPU.
pub fn driver_version() -> Result<DriverVersion> {
    start_driver().map_err(|start| match start {
        Start::NoDevice => Error::Gpu("the NVIDIA driver finds no GPU".into()),
        Start::Failed(detail) => Error::Gpu(detail),
    })?;
    let mut number = 0;
    // SAFETY: the pointer is valid for writes, and the function was found in the library.
    let done = unsafe { sys::cuDriverGetVersion(&raw mut number) }.result();
    done.map_err(|error| Error::Gpu(words("ask for the driver's version", error)))?;
    let number = u32::try_from(number).unwrap_or(0);
    let release = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    Ok(DriverVersion { cuda: (number / 1000, number % 1000 / 10), release: DriverVersion::release_in(&release) })
}

#[derive(Debug, Clone)]
enum Start {
    NoDevice,
    Failed(String),
}

/// Opens and initializes the driver library, once per process.
fn start_driver() -> Result<(), Start> {
    static STARTED: OnceLock<Result<(), Start>> = OnceLock::new();
    let start = || {
        // SAFETY: opening the driver library runs its initializers, which have no preconditions.
        if !unsafe { sys::is_culib_present() } {
            return Err(Start::Failed(
                "no NVIDIA driver is loaded: libcuda.so.1, which is part of it, cannot be opened".into(),
            ));
        }
        // SAFETY: as above; the library was found, without which `culib` would abort the process.
        let library = unsafe { sys::culib() };
        for name in FUNCTIONS {
            // SAFETY: the symbol is only looked up, not called.
            if unsafe { library.get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_err() {
                return Err(Start::Failed(format!(
                    "libcuda.so.1 has no function {name}: aotron needs an NVIDIA driver of version 525 or newer, and one of 580 \
                     or newer for libraries built with CUDA 13"
                )));
            }
        }
        match result::init() {
            Ok(()) => Ok(()),
            Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Err(Start::NoDevice),
            Err(error) => Err(Start::Failed(words("start the NVIDIA driver", error))),
        }
    };
    STARTED.get_or_init(start).clone()
}

fn info(index: usize) -> Result<DeviceInfo> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let ask = || {
        let device = result::device::get(i32::try_from(index).unwrap_or(i32::MAX))?;
        let name = result::device::get_name(device)?;
        // SAFETY: `device` is the handle the driver returned for this index.
        let (major, minor, memory) = unsafe {
            (
                result::device::get_attribute(device, MAJOR)?,
                result::device::get_attribute(device, MINOR)?,
                result::device::total_mem(device)?,
            )
        };
        Ok(DeviceInfo {
            index,
            name,
            compute_capability: u16::try_from(10 * major + minor).unwrap_or(0),
            memory_bytes: memory as u64,
        })
    };
    ask().map_err(|error| Error::Gpu(words(&format!("ask about GPU {index}"), error)))
}

/// Describes a failed action in the driver's words, with a remedy if one is known.
pub(super) fn words(action: &str, error: DriverError) -> String {
    let text = |found: Result<&std::ffi::CStr, DriverError>| {
        found.map_or_else(|_| format!("{:?}", error.0), |text| text.to_string_lossy().into_owned())
    };
    let (name, meaning) = (text(error.error_name()), text(error.error_string()));
    let remedy = match error.0 {
        CUresult::CUDA_ERROR_STUB_LIBRARY => ": libcuda.so.1 is a stub to link against; remove it from the search path",
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => ": restart the machine, because the driver was updated",
        CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE | CUresult::CUDA_ERROR_INSUFFICIENT_LOADER_VERSION => {
            ": update the NVIDIA driver"
        }
        CUresult::CUDA_ERROR_SYSTEM_NOT_READY => ": nvidia-fabricmanager may not be running",
        _ => "",
    };
    format!("cannot {action}: {meaning} ({name}){remedy}")
}

/// Returns true for a sticky error, after which every call in the context fails.
pub(super) fn is_sticky(error: DriverError) -> bool {
    use CUresult::*;
    matches!(
        error.0,
        CUDA_ERROR_DEINITIALIZED
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTAINED
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_TENSOR_MEMORY_LEAK
            | CUDA_ERROR_EXTERNAL_DEVICE
            | CUDA_ERROR_UNKNOWN
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine with a driver, checks that the listed GPUs are plausible.
    #[test]
    fn without_a_driver_there_is_one_clear_error() {
        match devices() {
            Ok(devices) => {
                for (index, device) in devices.iter().enumerate() {
                    assert_eq!(device.index, index);
                    assert!(device.compute_capability >= 50 && device.memory_bytes > 0, "{device:?}");
                }
            }
            Err(error) => {
                let text = error.to_string();
                assert!(text.starts_with("GPU: "), "{text}");
                assert_eq!(devices().unwrap_err().to_string(), text, "the error is the same every time");
            }
        }
    }
}
