//! The GPU, through CUDA's driver API: the only place that calls it.
//!
//! The driver's library is opened when a GPU is first asked for. Without one, everything here is an [`Error::Gpu`] that
//! says so. A failure after which the GPU refuses everything (an uncorrectable memory error, an illegal address) is kept,
//! and every later call repeats it: CUDA leaves a process no way back from these but to be started anew.
#![allow(unsafe_code)]

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

pub use self::driver::devices;
use self::driver::{is_sticky, words};
use super::DeviceInfo;
use crate::error::{Error, Result};

mod driver;

/// What addresses of tensors are multiples of; what the driver allocates starts at one.
pub const ALIGN: u64 = 256;

/// A GPU in use. What is made with it keeps it in use.
#[derive(Debug, Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    info: DeviceInfo,
    device: sys::CUdevice,
    /// The GPU's primary context, which TensorRT uses as well.
    context: sys::CUcontext,
    lost: OnceLock<String>,
}

// SAFETY: the driver's functions may be called from any thread; the context is made current on each before its use, and
// what else is here does not change or is a `OnceLock`.
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
        // SAFETY: retained in `Device::open`, and nothing made with it is left, since all of it keeps this alive. What
        // the driver says of a context that failed is of no use to anyone.
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
            let lost = format!("GPU {index} ({name}) has failed; start aotron anew to use it again: {text}");
            Error::Gpu(self.lost.get_or_init(|| lost).clone())
        })
    }
}

impl Device {
    /// Starts to use a GPU.
    ///
    /// # Errors
    /// [`Error::Gpu`] if there is no driver, no such GPU, or it refuses.
    pub fn open(index: usize) -> Result<Device> {
        let devices = devices()?;
        let count = devices.len();
        let info = devices.into_iter().nth(index).ok_or_else(|| {
            Error::Gpu(format!(
                "there is no GPU {index}: the driver lists {count}, counted from 0 (CUDA_VISIBLE_DEVICES hides some)"
            ))
        })?;
        let retain = || {
            let device = result::device::get(i32::try_from(index).unwrap_or(i32::MAX))?;
            // SAFETY: `device` is what the driver gave for this number.
            Ok((device, unsafe { result::primary_ctx::retain(device) }?))
        };
        let (device, context) =
            retain().map_err(|error| Error::Gpu(words(&format!("use GPU {index} ({})", info.name), error)))?;
        let device = Device(Arc::new(Inner { info, device, context, lost: OnceLock::new() }));
        device.bind()?;
        Ok(device)
    }

    /// Which it is.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// Makes the GPU current on this thread, as TensorRT expects it.
    ///
    /// # Errors
    /// [`Error::Gpu`] if it has failed.
    pub fn bind(&self) -> Result<()> {
        self.0.bind()
    }

    /// Memory that nothing uses.
    ///
    /// # Errors
    /// [`Error::Gpu`] if it has failed.
    pub fn free_bytes(&self) -> Result<u64> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both point to where a number may be written.
        let done = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) }.result();
        self.0.check(done, || "ask for the GPU's free memory".into())?;
        Ok(free as u64)
    }

    /// Memory of the GPU; what is in it is not defined.
    ///
    /// # Errors
    /// [`Error::Gpu`] with the numbers if there is not enough.
    pub fn allocate(&self, bytes: u64, what: &str) -> Result<Buffer> {
        let free = self.free_bytes()?;
        let count = usize::try_from(bytes.max(1)).unwrap_or(usize::MAX);
        // SAFETY: the context is current; the memory is freed by `Buffer` alone.
        let address = self.0.check(unsafe { result::malloc_sync(count) }, || {
            format!("allocate {bytes} bytes for {what} on GPU {}, where {free} bytes are free", self.info().index)
        })?;
        Ok(Buffer { device: self.clone(), address, bytes })
    }

    /// Memory of the host that the GPU copies from and to, zeroed.
    ///
    /// # Errors
    /// [`Error::Gpu`] if there is not enough.
    pub fn pinned(&self, bytes: usize, what: &str) -> Result<Pinned> {
        self.bind()?;
        let action = || format!("allocate {bytes} bytes of pinned host memory for {what}");
        // SAFETY: the context is current; the memory is freed by `Pinned` alone.
        let pointer = self.0.check(unsafe { result::malloc_host(bytes.max(1), 0) }, action)?;
        let Some(pointer) = NonNull::new(pointer.cast::<u8>()) else {
            return Err(Error::Gpu(format!("cannot {}: the driver gives none", action())));
        };
        // SAFETY: `pointer` is to that many bytes, which nothing else refers to.
        unsafe { pointer.write_bytes(0, bytes) };
        let mut pinned = Pinned { device: self.clone(), pointer, bytes, copied: None, busy: false, stuck: false };
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        pinned.copied = Some(self.0.check(event, || "create an event".into())?);
        Ok(pinned)
    }

    /// A queue of work.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the GPU refuses.
    pub fn stream(&self) -> Result<Stream> {
        self.bind()?;
        let handle = result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(Stream { handle: self.0.check(handle, || "create a stream".into())?, device: self.clone() })
    }
}

/// A part of the GPU's memory.
#[derive(Debug)]
pub struct Buffer {
    device: Device,
    address: u64,
    bytes: u64,
}

impl Buffer {
    /// Where it starts: at a multiple of [`ALIGN`].
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The address of `range`, which must lie inside.
    fn part(&self, range: Range<u64>) -> Result<u64> {
        if range.start > range.end || range.end > self.bytes {
            return Err(Error::Gpu(format!("bytes {range:?} of a buffer of {} bytes", self.bytes)));
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

/// Memory of the host that copies run from and to while the program goes on. It is handed out only when the last of them
/// is done.
#[derive(Debug)]
pub struct Pinned {
    device: Device,
    pointer: NonNull<u8>,
    bytes: usize,
    /// Comes after the last copy; there but while it is being made.
    copied: Option<sys::CUevent>,
    busy: bool,
    /// A copy may be under way of which nothing tells the end.
    stuck: bool,
}

// SAFETY: it owns its memory and its event, and neither is tied to a thread.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Its size.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether its size is 0.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Its bytes, once no copy uses them.
    ///
    /// # Errors
    /// [`Error::Gpu`] if a copy, or work before it in its stream, failed.
    pub fn bytes(&mut self) -> Result<&mut [u8]> {
        self.wait()?;
        // SAFETY: the pointer is to that many initialized bytes; no copy uses them, and none begins while they are
        // borrowed, since that takes `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.bytes) })
    }

    fn wait(&mut self) -> Result<()> {
        if self.stuck {
            return Err(Error::Gpu("pinned memory is lost to a copy that never ended".into()));
        }
        if let (true, Some(event)) = (self.busy, self.copied) {
            self.device.bind()?;
            // SAFETY: the event lives as long as this.
            self.device.0.check(unsafe { result::event::synchronize(event) }, || "copy".into())?;
            self.busy = false;
        }
        Ok(())
    }

    /// Begins to copy `range` of it to the GPU.
    ///
    /// # Errors
    /// [`Error::Gpu`] if either range is not inside its memory or the GPU refuses.
    pub fn upload(&mut self, range: Range<usize>, to: &Buffer, offset: u64, stream: &Stream) -> Result<()> {
        let (host, address) = self.ends(range, to, offset)?;
        // SAFETY: `host` is not handed out before the event behind the copy, and freed after it; `address` is inside a
        // buffer, whose freeing waits for the copy.
        let done = unsafe { result::memcpy_htod_async(address, &*host, stream.handle) };
        self.device.0.check(done, || format!("copy {} bytes to the GPU", host.len()))?;
        self.record(stream)
    }

    /// Begins to copy from the GPU to `range` of it.
    ///
    /// # Errors
    /// As [`Pinned::upload`].
    pub fn download(&mut self, range: Range<usize>, from: &Buffer, offset: u64, stream: &Stream) -> Result<()> {
        let (host, address) = self.ends(range, from, offset)?;
        // SAFETY: as for `upload`; the slice is the one reference to its bytes.
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
            return Err(Error::Gpu(format!("bytes {range:?} of {} pinned ones", self.bytes)));
        }
        // From here on a copy may be under way, also where the next call fails.
        self.busy = true;
        // SAFETY: the range is inside, so the pointer is too.
        let start = unsafe { all.cast::<u8>().add(range.start) };
        Ok((std::ptr::slice_from_raw_parts_mut(start, range.len()), address))
    }

    fn record(&mut self, stream: &Stream) -> Result<()> {
        let Some(event) = self.copied else { return Ok(()) };
        // SAFETY: event and stream are alive and of one context.
        let recorded = unsafe { result::event::record(event, stream.handle) };
        let recorded = self.device.0.check(recorded, || "record an event".into());
        self.stuck = recorded.is_err() && stream.wait().is_err();
        recorded
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.wait().is_err() {
            // A copy may never end: better to leave the memory than to have it reused under the copy.
            return;
        }
        if self.device.bind().is_ok() {
            // SAFETY: both were made with this context, and no copy uses the memory.
            unsafe {
                let _ = self.copied.take().map(|event| result::event::destroy(event));
                let _ = result::free_host(self.pointer.as_ptr().cast());
            }
        }
    }
}

/// A queue of work of one GPU: one piece after the other.
#[derive(Debug)]
pub struct Stream {
    handle: sys::CUstream,
    device: Device,
}

// SAFETY: a stream is not tied to a thread, and the driver lets several use one. (While one records, what another puts
// into it is recorded too; only the executor records, and its stream is its own.)
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// Its GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The number that stands for it, which TensorRT takes.
    pub(super) fn number(&self) -> u64 {
        self.handle as usize as u64
    }

    /// Waits for all work in it.
    ///
    /// # Errors
    /// [`Error::Gpu`] if any of it failed.
    pub fn wait(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the handle lives as long as this.
        self.device.0.check(unsafe { result::stream::synchronize(self.handle) }, || "finish a step".into())
    }

    /// Sets a buffer to zeros.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the GPU refuses.
    pub fn zero(&self, buffer: &Buffer) -> Result<()> {
        self.device.bind()?;
        let bytes = usize::try_from(buffer.bytes).unwrap_or(usize::MAX);
        // SAFETY: that many bytes are the buffer's, whose freeing waits for this.
        let done = unsafe { result::memset_d8_async(buffer.address, 0, bytes, self.handle) };
        self.device.0.check(done, || format!("clear {bytes} bytes"))
    }

    /// Records what `work` puts into the stream, without running it: runs of contexts, no copies, which would use host
    /// memory that the graph does not keep.
    ///
    /// # Errors
    /// [`Error::Gpu`] if something in it cannot be recorded, or whatever `work` reports. The stream is as before.
    pub(super) fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THIS_THREAD;
        self.device.bind()?;
        let inner = &self.device.0;
        // SAFETY: the handle lives as long as this; the recording is ended below whatever happens in between.
        inner.check(unsafe { result::stream::begin_capture(self.handle, THIS_THREAD) }, || "record a step".into())?;
        let worked = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: a recording has begun, `graph` may be written to. It stays null where the recording is not valid.
        let ended = unsafe { sys::cuStreamEndCapture(self.handle, &raw mut graph) }.result();
        let recorded = worked.and_then(|()| inner.check(ended, || "record a step".into())).and_then(|()| {
            let mut exec = std::ptr::null_mut();
            // SAFETY: the graph is whole, `exec` may be written to.
            let done = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0) }.result();
            inner.check(done, || "prepare a recorded step".into())?;
            Ok(CudaGraph { exec, device: self.device.clone() })
        });
        if !graph.is_null() {
            // SAFETY: made above; what was instantiated from it is its own.
            let _ = unsafe { sys::cuGraphDestroy(graph) }.result();
        }
        recorded
    }

    /// Runs a recorded step. What it uses must still be there and where it was.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the GPU refuses.
    pub(super) fn replay(&self, graph: &CudaGraph) -> Result<()> {
        self.device.bind()?;
        // SAFETY: both are alive. The addresses in the graph are the GPU's; that they are in use is up to the caller,
        // and no memory of this program is behind them.
        self.device.0.check(unsafe { sys::cuGraphLaunch(graph.exec, self.handle) }.result(), || "run a step".into())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created in `Device::stream`. The driver lets the work in it end first.
            let _ = unsafe { result::stream::destroy(self.handle) };
        }
    }
}

/// Work that was recorded.
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
            // SAFETY: instantiated in `Stream::record`. If it runs, the driver destroys it afterwards.
            let _ = unsafe { sys::cuGraphExecDestroy(self.exec) }.result();
        }
    }
}
