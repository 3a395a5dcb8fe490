//! Strided fills and copies in the GPU's memory: rows of bytes at equal distances.

use cudarc::driver::sys;

use super::{Buffer, Stream};
use crate::error::{Error, Result};

/// Rows of bytes in a buffer.
#[derive(Debug, Clone, Copy)]
pub struct ByteGrid<'a> {
    /// The buffer.
    pub buffer: &'a Buffer,
    /// Offset of the first row.
    pub offset: u64,
    /// Distance from the start of a row to the start of the next.
    pub pitch: u64,
}

impl ByteGrid<'_> {
    /// Device address and pitch of `height` rows of `width` bytes, after checking that they are disjoint and inside the
    /// buffer.
    fn checked(&self, width: u64, height: u64) -> Result<(u64, usize)> {
        let ByteGrid { buffer, offset, pitch } = *self;
        let rows = height.saturating_sub(1).saturating_mul(pitch).saturating_add(width);
        let address = buffer.part(offset..offset.saturating_add(rows))?;
        if pitch < width {
            return Err(Error::Gpu(format!("rows of {width} bytes overlap: they are {pitch} bytes apart")));
        }
        Ok((address, size(pitch)?))
    }
}

fn size(bytes: u64) -> Result<usize> {
    usize::try_from(bytes).map_err(|_| Error::Gpu(format!("{bytes} bytes are more than can be addressed")))
}

impl Stream {
    /// Enqueues setting `height` rows of `width` bytes to a value.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the rows overlap or leave the buffer, or if the driver fails.
    pub fn fill_rows(&self, to: ByteGrid<'_>, value: u8, width: u64, height: u64) -> Result<()> {
        if width == 0 || height == 0 {
            return Ok(());
        }
        let (address, pitch) = to.checked(width, height)?;
        self.device.bind()?;
        // SAFETY: the rows are inside a buffer, whose deallocation waits for this work.
        let done =
            unsafe { sys::cuMemsetD2D8Async(address, pitch, value, size(width)?, size(height)?, self.handle) }.result();
        self.device.0.check(done, || format!("fill {height} rows of {width} bytes"))
    }

    /// Enqueues copying `height` rows of `width` bytes within the GPU's memory. The two must not overlap.
    ///
    /// # Errors
    /// As [`Stream::fill_rows`].
    pub fn copy_rows(&self, from: ByteGrid<'_>, to: ByteGrid<'_>, width: u64, height: u64) -> Result<()> {
        if width == 0 || height == 0 {
            return Ok(());
        }
        let ((source, source_pitch), (target, target_pitch)) =
            (from.checked(width, height)?, to.checked(width, height)?);
        self.device.bind()?;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            srcHost: std::ptr::null(),
            srcDevice: source,
            srcArray: std::ptr::null_mut(),
            srcPitch: source_pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: target,
            dstArray: std::ptr::null_mut(),
            dstPitch: target_pitch,
            WidthInBytes: size(width)?,
            Height: size(height)?,
        };
        // SAFETY: both are inside buffers, whose deallocation waits for this work; the driver reads `copy` before it
        // returns.
        let done = unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, self.handle) }.result();
        self.device.0.check(done, || format!("copy {height} rows of {width} bytes in the GPU's memory"))
    }
}
