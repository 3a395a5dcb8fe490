//! Safe wrappers of the CUDA driver API, which is called nowhere else.
//!
//! The driver library is opened on first use; without one, every function returns an [`Error::Gpu`] that says so.
//! Sticky errors (an uncorrectable memory error, an illegal address) are recorded and returned by every later call:
//! CUDA gives a process no way to recover from them other than a restart.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

pub use self::copy::ByteGrid;
pub use self::driver::{devices, driver_version};
use self::driver::{is_sticky, words};
use super::DeviceInfo;
use crate::error::{Error, Result};

mod copy;
mod driver;

/// Required alignment of tensor addresses, in bytes. Allocations of the driver are aligned to it.
pub const ALIGN: u64 = 256;

/// A GPU in use. Everything created from it keeps it open.
#[derive(Debug, Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    info: DeviceInfo,
    device: sys::CUdevice,
    /// The GPU's primary context, which TensorRT uses as well.
    context: sys::CUcontext,
    lost: OnceLock<String>,
}

// SAFETY: the driver's functions may be called from any thread; the context is made current on each thread before use,
// and the other fields are immutable or a `OnceLock`.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.info.fmt(f)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: retained in `Device::open`, and nothing created from it is left, since all of that keeps this alive.
        // An error from releasing a failed context is of no use to anyone.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

impl Inner {
    /// Makes the context current on this thread.
    fn bind(&self) -> Result<()> {
        if let Some(words) = self.lost.get() {
            return Err(Error::Gpu(words.clone()));
        }
        // SAFETY: the context is retained as long as this lives.
        self.check(unsafe { result::ctx::set_current(self.context) }, || "use the GPU".into())
    }

    fn check<T>(&self, done: Result<T, DriverError>, action: impl FnOnce() -> String) -> Result<T> {
        done.map_err(|error| {
            let text = words(&action(), error);
            if !is_sticky(error) {
                return Error::Gpu(text);
            }
            let DeviceInfo { index, name, .. } = &self.info;
            let lost = format!("GPU {index} ({name}) has failed; restart aotron to use it again: {text}");
            Error::Gpu(self.lost.get_or_init(|| lost).clone())
        })
    }
}

impl Device {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`Error::Gpu`] if there is no driver or no such GPU, or if it cannot be used.
    pub fn open(index: usize) -> Result<Device> {
        let devices = devices()?;
        let count = devices.len();
        let info = devices.into_iter().nth(index).ok_or_else(|| {
            Error::Gpu(format!(
                "there is no GPU {index}: the driver lists {count}, counted from 0 (CUDA_VISIBLE_DEVICES may hide some)"
            ))
        })?;
        let retain = || {
            let device = result::device::get(i32::try_from(index).unwrap_or(i32::MAX))?;
            // SAFETY: `device` is the handle the driver returned for this index.
            Ok((device, unsafe { result::primary_ctx::retain(device) }?))
        };
        let (device, context) =
            retain().map_err(|error| Error::Gpu(words(&format!("use GPU {index} ({})", info.name), error)))?;
        let device = Device(Arc::new(Inner { info, device, context, lost: OnceLock::new() }));
        device.bind()?;
        Ok(device)
    }

    /// Returns true once every call of this GPU fails.
    pub fn is_lost(&self) -> bool {
        self.0.lost.get().is_some()
    }

    /// Name, index and memory of the GPU.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// Makes the GPU's context current on this thread, as TensorRT requires.
    ///
    /// # Errors
    /// [`Error::Gpu`] if it has failed.
    pub fn bind(&self) -> Result<()> {
        self.0.bind()
    }

    /// Free device memory.
    ///
    /// # Errors
    /// [`Error::Gpu`] if it has failed.
    pub fn free_bytes(&self) -> Result<u64> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both pointers are valid for writes.
        let done = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }.result();
        self.0.check(done, || "ask for the GPU's free memory".into())?;
        Ok(free as u64)
    }

    /// Allocates device memory, uninitialized. `what` names it in errors.
    ///
    /// # Errors
    /// [`Error::Gpu`] with the requested and free bytes if there is not enough.
    pub fn allocate(&self, bytes: u64, what: &str) -> Result<Buffer> {
        let free = self.free_bytes()?;
        let count = usize::try_from(bytes.max(1)).unwrap_or(usize::MAX);
        // SAFETY: the context is current; only `Buffer` frees the memory.
        let address = self.0.check(unsafe { result::malloc_sync(count) }, || {
            format!("allocate {bytes} bytes for {what} on GPU {}, where {free} bytes are free", self.info().index)
        })?;
        Ok(Buffer { device: self.clone(), address, bytes })
    }

    /// Allocates pinned host memory for transfers to and from the GPU, zeroed.
    ///
    /// # Errors
    /// [`Error::Gpu`] if there is not enough.
    pub fn pinned(&self, bytes: usize, what: &str) -> Result<Pinned> {
        self.bind()?;
        let action = || format!("allocate {bytes} bytes of pinned host memory for {what}");
        // SAFETY: the context is current; only `Pinned` frees the memory.
        let pointer = self.0.check(unsafe { result::malloc_host(bytes.max(1), 0) }, action)?;
        let Some(pointer) = NonNull::new(pointer.cast::<u8>()) else {
            return Err(Error::Gpu(format!("cannot {}: the driver returned a null pointer", action())));
        };
        // SAFETY: `pointer` is valid for `bytes` bytes, which nothing else refers to.
        unsafe { pointer.write_bytes(0, bytes) };
        let mut pinned = Pinned { device: self.clone(), pointer, bytes, copied: None, busy: false, stuck: false };
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        pinned.copied = Some(self.0.check(event, || "create an event".into())?);
        Ok(pinned)
    }

    /// Creates a stream.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails.
    pub fn stream(&self) -> Result<Stream> {
        self.bind()?;
        let handle = result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(Stream { handle: self.0.check(handle, || "create a stream".into())?, device: self.clone() })
    }
}

/// An allocation of device memory.
#[derive(Debug)]
pub struct Buffer {
    device: Device,
    address: u64,
    bytes: u64,
}

impl Buffer {
    /// Device address, a multiple of [`ALIGN`].
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Device address of a range within the buffer.
    fn part(&self, range: Range<u64>) -> Result<u64> {
        if range.start > range.end || range.end > self.bytes {
            return Err(Error::Gpu(format!("bytes {range:?} are outside of a buffer of {} bytes", self.bytes)));
        }
        Ok(self.address + range.start)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `Device::allocate`; the driver waits for work that still uses it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Pinned host memory for asynchronous copies. Its bytes are only accessible once the last copy has finished.
#[derive(Debug)]
pub struct Pinned {
    device: Device,
    pointer: NonNull<u8>,
    bytes: usize,
    /// Event recorded after the last copy; `None` only during construction.
    copied: Option<sys::CUevent>,
    busy: bool,
    /// A copy may be in flight whose completion cannot be observed.
    stuck: bool,
}

// SAFETY: owns its memory and its event, neither of which is tied to a thread.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Returns true if the size is 0.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The bytes, after waiting for the last copy.
    ///
    /// # Errors
    /// [`Error::Gpu`] if a copy, or work before it in its stream, failed.
    pub fn bytes(&mut self) -> Result<&mut [u8]> {
        self.wait()?;
        // SAFETY: the pointer is valid for that many initialized bytes; no copy uses them, and none can start while
        // they are borrowed, since starting one takes `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.bytes) })
    }

    fn wait(&mut self) -> Result<()> {
        if self.stuck {
            return Err(Error::Gpu("pinned memory is still in use by a copy that never finished".into()));
        }
        if let (true, Some(event)) = (self.busy, self.copied) {
            self.device.bind()?;
            // SAFETY: the event lives as long as `self`.
            self.device.0.check(unsafe { result::event::synchronize(event) }, || "copy".into())?;
            self.busy = false;
        }
        Ok(())
    }

    /// Starts copying `range` of this memory to the GPU.
    ///
    /// # Errors
    /// [`Error::Gpu`] if either range is out of bounds or the driver fails.
    pub fn upload(&mut self, range: Range<usize>, to: &Buffer, offset: u64, stream: &Stream) -> Result<()> {
        let (host, address) = self.ends(range, to, offset)?;
        // SAFETY: `host` is neither handed out nor freed before the event recorded after the copy; `address` is inside
        // a buffer, whose deallocation waits for the copy.
        let done = unsafe { result::memcpy_htod_async(address, &*host, stream.handle) };
        self.device.0.check(done, || format!("copy {} bytes to the GPU", host.len()))?;
        self.record(stream)
    }

    /// Starts copying from the GPU to `range` of this memory.
    ///
    /// # Errors
    /// As [`Pinned::upload`].
    pub fn download(&mut self, range: Range<usize>, from: &Buffer, offset: u64, stream: &Stream) -> Result<()> {
        let (host, address) = self.ends(range, from, offset)?;
        // SAFETY: as for `upload`; the slice is the only reference to its bytes.
        let done = unsafe { result::memcpy_dtoh_async(&mut *host, address, stream.handle) };
        self.device.0.check(done, || format!("copy {} bytes from the GPU", host.len()))?;
        self.record(stream)
    }

    fn ends(&mut self, range: Range<usize>, buffer: &Buffer, offset: u64) -> Result<(*mut [u8], u64)> {
        let len = range.len() as u64;
        let address = buffer.part(offset..offset.saturating_add(len))?;
        self.device.bind()?;
        let all = std::ptr::slice_from_raw_parts_mut(self.pointer.as_ptr(), self.bytes);
        if range.start > range.end || range.end > self.bytes {
            return Err(Error::Gpu(format!("bytes {range:?} are outside of {} bytes of pinned memory", self.bytes)));
        }
        // From here on a copy may be in flight, even if the next call fails.
        self.busy = true;
        // SAFETY: the range was checked to be in bounds.
        let start = unsafe { all.cast::<u8>().add(range.start) };
        Ok((std::ptr::slice_from_raw_parts_mut(start, range.len()), address))
    }

    fn record(&mut self, stream: &Stream) -> Result<()> {
        let Some(event) = self.copied else { return Ok(()) };
        // SAFETY: event and stream are alive and belong to the same context.
        let recorded = unsafe { result::event::record(event, stream.handle) };
        let recorded = self.device.0.check(recorded, || "record an event".into());
        self.stuck = recorded.is_err() && stream.wait().is_err();
        recorded
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.wait().is_err() {
            // The copy may still be running: leaking the memory is better than reusing it under the copy.
            return;
        }
        if self.device.bind().is_ok() {
            // SAFETY: both were created in this context, and no copy uses the memory.
            unsafe {
                let _ = self.copied.take().map(|event| result::event::destroy(event));
                let _ = result::free_host(self.pointer.as_ptr().cast());
            }
        }
    }
}

/// A CUDA stream: work of one GPU, executed in order.
#[derive(Debug)]
pub struct Stream {
    handle: sys::CUstream,
    device: Device,
}

// SAFETY: a stream is not tied to a thread, and the driver allows concurrent use. (During capture, work that another
// thread enqueues is captured too; only the executor captures, and it does not share its stream.)
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// The stream's GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The handle as a number, as it crosses the bridge to TensorRT.
    pub(super) fn number(&self) -> u64 {
        self.handle as usize as u64
    }

    /// Waits for all enqueued work.
    ///
    /// # Errors
    /// [`Error::Gpu`] if any of the work failed.
    pub fn wait(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the handle lives as long as `self`.
        self.device.0.check(unsafe { result::stream::synchronize(self.handle) }, || "finish a step".into())
    }

    /// Fills a buffer with zeros.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails.
    pub fn zero(&self, buffer: &Buffer) -> Result<()> {
        self.fill(buffer, 0..buffer.bytes, 0)
    }

    /// Fills a range of a buffer with a byte.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the range is outside of the buffer or the driver fails.
    pub fn fill(&self, buffer: &Buffer, range: Range<u64>, byte: u8) -> Result<()> {
        self.device.bind()?;
        let bytes = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        let address = buffer.part(range)?;
        // SAFETY: the range was checked to lie in the buffer, whose deallocation waits for this work.
        let done = unsafe { result::memset_d8_async(address, byte, bytes, self.handle) };
        self.device.0.check(done, || format!("fill {bytes} bytes"))
    }

    /// Captures the work that `work` enqueues as a CUDA graph, without running it. Only runs of execution contexts may
    /// be captured: copies would use host memory that the graph does not keep alive.
    ///
    /// # Errors
    /// [`Error::Gpu`] if something in it cannot be captured, or the error of `work`. The stream is left as before.
    pub(super) fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THIS_THREAD;
        self.device.bind()?;
        let inner = &self.device.0;
        // SAFETY: the handle lives as long as `self`; the capture is ended below whatever happens in between.
        inner.check(unsafe { result::stream::begin_capture(self.handle, THIS_THREAD) }, || "record a step".into())?;
        let worked = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: a capture is active and `graph` is valid for writes. It stays null if the capture was invalidated.
        let ended = unsafe { sys::cuStreamEndCapture(self.handle, &raw mut graph) }.result();
        let recorded = worked.and_then(|()| inner.check(ended, || "record a step".into())).and_then(|()| {
            let mut exec = std::ptr::null_mut();
            // SAFETY: the graph is complete and `exec` is valid for writes.
            let done = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0) }.result();
            inner.check(done, || "prepare a recorded step".into())?;
            Ok(CudaGraph { exec, device: self.device.clone() })
        });
        if !graph.is_null() {
            // SAFETY: returned above; an executable graph does not depend on the graph it was instantiated from.
            let _ = unsafe { sys::cuGraphDestroy(graph) }.result();
        }
        recorded
    }

    /// Launches a captured graph. The memory it uses must still be allocated at the same addresses.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails.
    pub(super) fn replay(&self, graph: &CudaGraph) -> Result<()> {
        self.device.bind()?;
        // SAFETY: both are alive. The graph only contains device addresses, so even if the caller freed one, no memory
        // of this process is touched.
        self.device.0.check(unsafe { sys::cuGraphLaunch(graph.exec, self.handle) }.result(), || "run a step".into())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created in `Device::stream`. The driver lets enqueued work finish first.
            let _ = unsafe { result::stream::destroy(self.handle) };
        }
    }
}

/// A captured, executable CUDA graph.
#[derive(Debug)]
pub struct CudaGraph {
    exec: sys::CUgraphExec,
    device: Device,
}

// SAFETY: a graph is not tied to a thread.
unsafe impl Send for CudaGraph {}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: instantiated in `Stream::record`. If it is running, the driver destroys it afterwards.
            let _ = unsafe { sys::cuGraphExecDestroy(self.exec) }.result();
        }
    }
}
