//! Linear layers: `x · weightᵀ` over packed weights.
//!
//! A **linear kernel** owns how a weight is laid out in the package, how it is packed, and the tile that multiplies it:
//! one file, one [`LinearKernel`]. The [driver](linear) below knows none of it: it cuts the work into tasks, runs each
//! task's tile, and finishes the sums. [`Packing`] is a kernel's name in a plan; [`choose`] picks one for a weight, an
//! activation and a CPU.
//!
//! Sizes follow the usual GEMM names: a tile computes MC rows of `x` by NR outputs, MR rows at a time in registers, KC
//! inputs at a time in a cache.
//!
//! **Same bits.** A kernel computes each sum by one fixed sequence of operations, whatever rows stand beside it and
//! however rows are blocked; its tests check that a row alone gives the bits it gives in a batch.

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod avx2;
mod codes;
mod float;
mod int4;
mod int8;

use std::fmt;

use half::bf16;
use rayon::prelude::*;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::rowwise::RowsMut;
use super::{FloatElement, RowsRef};
use crate::error::{Error, Result, clip};
use crate::isa::{CpuFeatures, Isa, dispatch};
use crate::tensor::DType;

/// Every kernel. Of those that fit a weight and its activations, [`choose`] takes the first whose features a CPU has.
static KERNELS: &[&dyn LinearKernel] =
    &[&float::F32, &float::BF16, &codes::I8, &codes::I4, &codes::F8, &int4::PAIRS, &int8::VNNI, &int8::QUADS];

/// Multiply-adds below which a linear layer is not worth waking other threads.
const SERIAL_WORK: usize = 1 << 18;
/// Sums that a task of few rows has room for; a task of more has [`MAX_SUMS`]. The room is zeroed, which costs a decode
/// step more than it should where it is larger than needed.
const FEW_SUMS: usize = 8 * 64;
/// The most sums of a task, MC × NR.
const MAX_SUMS: usize = 96 * 64;

/// A stored operand of a linear kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operand {
    /// The weight's values, or its codes.
    Weight,
    /// The scales of its codes.
    Scales,
}

/// The logical shape of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// Outputs: rows of the weight.
    pub outputs: usize,
    /// Inputs: columns of the weight.
    pub inputs: usize,
    /// Inputs that share a scale; `inputs` or more means per-channel scales. Meaningless without scales.
    pub group: usize,
}

/// MR, NR and MC of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TileSize {
    /// Rows of `x` in registers at once.
    pub mr: usize,
    /// Outputs of one panel: those that a tile computes.
    pub nr: usize,
    /// Rows of `x` of one task.
    pub mc: usize,
}

/// Owns the layout, the packing and the tile of one way to keep a weight.
pub trait LinearKernel: Sync {
    /// The name in plans.
    fn name(&self) -> &'static str;

    /// Element type of the weight.
    fn weight_dtype(&self) -> DType;

    /// Element types of `x` that it takes.
    fn activation_dtypes(&self) -> &'static [DType];

    /// The features it was written for. It runs without them, by a portable tile: see [`LinearKernel::tile`].
    fn features(&self) -> CpuFeatures {
        CpuFeatures::PORTABLE
    }

    /// Its tile.
    fn tile_size(&self) -> TileSize;

    /// Returns true if the weight is stored with scales.
    fn has_scales(&self) -> bool;

    /// Checks that it can compute with a weight of this shape.
    ///
    /// # Errors
    /// The reason it cannot.
    fn check(&self, shape: LinearShape) -> Result<(), String>;

    /// Shape of one panel of the weight, NR rows of `columns` values. A panel of scales is `[columns, NR]` of F32 for every
    /// kernel: [`Packing`] sees to those.
    fn panel_shape(&self, columns: usize) -> PanelShape;

    /// Packs one panel of the weight: `rows` are NR rows of `columns` values or fewer, codes as numbers; `panel` is zeroed
    /// and of the shape of [`LinearKernel::panel_shape`].
    fn pack(&self, rows: &[f32], columns: usize, panel: &mut [u8]);

    /// The inverse of [`LinearKernel::pack`]: fills NR rows of `columns` values or fewer.
    fn unpack(&self, panel: &[u8], columns: usize, rows: &mut [f32]);

    /// Adds one panel's products with the first `sums.len() / NR` rows of `x` to `sums`, `[rows, NR]`, which is zero.
    /// Outputs past the weight's are padding, whatever they become.
    ///
    /// # Errors
    /// [`Error::Internal`] if `x` has an element type it does not take.
    fn tile(
        &self,
        isa: Isa,
        weight: &PackedWeight<'_>,
        panel: usize,
        x: Activations<'_>,
        sums: &mut [f32],
    ) -> Result<()>;
}

/// The shape of a panel: two or three dimensions, kept in place since steps, which allocate nothing, ask for it.
#[derive(Debug, Clone, Copy)]
pub struct PanelShape {
    dims: [usize; 3],
    rank: usize,
}

impl From<[usize; 2]> for PanelShape {
    fn from([a, b]: [usize; 2]) -> PanelShape {
        PanelShape { dims: [a, b, 1], rank: 2 }
    }
}

impl From<[usize; 3]> for PanelShape {
    fn from(dims: [usize; 3]) -> PanelShape {
        PanelShape { dims, rank: 3 }
    }
}

impl std::ops::Deref for PanelShape {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.dims[..self.rank]
    }
}

/// A linear kernel, by its name in a plan.
#[derive(Clone, Copy)]
pub struct Packing(&'static dyn LinearKernel);

/// The kernel for a weight of `weight` and activations of `x` on a CPU with these features, if there is one.
pub fn choose(weight: DType, x: DType, features: CpuFeatures) -> Option<Packing> {
    let fits = |kernel: &&&dyn LinearKernel| {
        kernel.weight_dtype() == weight
            && kernel.activation_dtypes().contains(&x)
            && features.contains(kernel.features())
    };
    KERNELS.iter().find(fits).map(|kernel| Packing(*kernel))
}

impl Packing {
    /// The kernel of this name.
    pub fn by_name(name: &str) -> Option<Packing> {
        KERNELS.iter().find(|kernel| kernel.name() == name).map(|kernel| Packing(*kernel))
    }

    /// Every packing there is.
    pub fn all() -> impl Iterator<Item = Packing> {
        KERNELS.iter().map(|kernel| Packing(*kernel))
    }

    /// Element type and shape of one panel of an operand, NR rows of `columns` values.
    fn panel(self, operand: Operand, columns: usize) -> (DType, PanelShape) {
        match operand {
            Operand::Weight => (self.weight_dtype(), self.panel_shape(columns)),
            Operand::Scales => (DType::F32, PanelShape::from([columns, self.tile_size().nr])),
        }
    }

    /// Shape in the weights file of an operand of `[rows, columns]`, with its element type.
    pub fn stored(self, operand: Operand, rows: usize, columns: usize) -> (DType, Vec<usize>) {
        let (dtype, panel) = self.panel(operand, columns);
        (dtype, [&[rows.div_ceil(self.tile_size().nr)], &*panel].concat())
    }

    /// Packs whole rows, `[rows, columns]`, from a multiple of NR on, as they are stored; codes come as numbers.
    pub fn pack(self, operand: Operand, rows: &[f32], columns: usize) -> Vec<u8> {
        let (dtype, shape) = self.panel(operand, columns);
        let panel_bytes = shape.iter().product::<usize>() * dtype.bytes();
        let nr = self.tile_size().nr;
        let panel_values = nr * columns.max(1);
        let mut packed = vec![0; rows.len().div_ceil(panel_values) * panel_bytes];
        for (rows, panel) in rows.chunks(panel_values).zip(packed.chunks_exact_mut(panel_bytes)) {
            match operand {
                Operand::Weight => self.0.pack(rows, columns, panel),
                Operand::Scales => pack_scales(nr, rows, columns, panel),
            }
        }
        packed
    }

    /// The inverse of [`Packing::pack`]: `[rows, columns]` values, codes as numbers. `None` if `packed` is not as long as
    /// such an operand.
    pub fn unpack(self, operand: Operand, packed: &[u8], rows: usize, columns: usize) -> Option<Vec<f32>> {
        let (dtype, shape) = self.panel(operand, columns);
        let panel_bytes = shape.iter().try_fold(dtype.bytes(), |bytes, n| bytes.checked_mul(*n))?;
        let nr = self.tile_size().nr;
        if columns == 0 || packed.len() != rows.div_ceil(nr).checked_mul(panel_bytes)? {
            return None;
        }
        let mut values = vec![0.0; rows.checked_mul(columns)?];
        for (rows, panel) in values.chunks_mut(nr * columns).zip(packed.chunks_exact(panel_bytes)) {
            match operand {
                Operand::Weight => self.0.unpack(panel, columns, rows),
                Operand::Scales => unpack_scales(nr, panel, columns, rows),
            }
        }
        Some(values)
    }
}

impl std::ops::Deref for Packing {
    type Target = dyn LinearKernel;

    fn deref(&self) -> &(dyn LinearKernel + 'static) {
        self.0
    }
}

impl PartialEq for Packing {
    fn eq(&self, other: &Packing) -> bool {
        self.name() == other.name()
    }
}

impl Eq for Packing {}

impl std::hash::Hash for Packing {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.name().hash(state);
    }
}

impl fmt::Debug for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Packing {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Packing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Packing, D::Error> {
        let name = String::deserialize(deserializer)?;
        Packing::by_name(&name).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "its weights are packed as `{}`, which this aotron does not know; pack them again with `aotron build \
                 PACKAGE --finish --recipe cpu`",
                clip(name)
            ))
        })
    }
}

/// A weight in its package, ready to be multiplied.
#[derive(Debug, Clone, Copy)]
pub struct PackedWeight<'a> {
    packing: Packing,
    weight: &'a [u8],
    scales: &'a [u8],
    shape: LinearShape,
}

impl<'a> PackedWeight<'a> {
    /// A weight of `shape` whose stored operands are `weight` and `scales`, the latter empty where the packing has none.
    ///
    /// # Errors
    /// [`Error::Internal`] if an operand has another length, or the packing cannot be of that shape: plans are checked
    /// when they are opened.
    pub fn new(packing: Packing, weight: &'a [u8], scales: &'a [u8], shape: LinearShape) -> Result<PackedWeight<'a>> {
        packing.check(shape).map_err(|detail| Error::internal(detail, "a checked plan"))?;
        let bytes = |operand, columns| {
            let (dtype, panel) = packing.panel(operand, columns);
            let panels = shape.outputs.div_ceil(packing.tile_size().nr);
            panel.iter().try_fold(dtype.bytes(), |bytes, n| bytes.checked_mul(*n))?.checked_mul(panels)
        };
        let scale_bytes = match packing.has_scales() {
            true => bytes(Operand::Scales, shape.inputs.div_ceil(shape.group)),
            false => Some(0),
        };
        if Some(weight.len()) != bytes(Operand::Weight, shape.inputs) || Some(scales.len()) != scale_bytes {
            let found = format!("{} and {} bytes of {shape:?} as {packing:?}", weight.len(), scales.len());
            return Err(Error::internal(found, "the lengths that the packing stores"));
        }
        Ok(PackedWeight { packing, weight, scales, shape })
    }

    /// Its logical shape.
    pub fn shape(&self) -> LinearShape {
        self.shape
    }

    /// The stored elements of one panel.
    fn panel<T: bytemuck::Pod>(&self, operand: Operand, index: usize) -> &'a [T] {
        let all: &[T] = bytemuck::cast_slice(match operand {
            Operand::Weight => self.weight,
            Operand::Scales => self.scales,
        });
        let len = all.len() / self.shape.outputs.div_ceil(self.packing.tile_size().nr);
        &all[index * len..(index + 1) * len]
    }
}

/// Rows of activations, `[rows, inputs]`.
#[derive(Debug, Clone, Copy)]
pub enum Activations<'a> {
    /// FP32.
    F32(RowsRef<'a, f32>),
    /// BF16.
    Bf16(RowsRef<'a, bf16>),
    /// 8-bit integers, each row with its scale: the row stands for `scales[row] · codes[row]`.
    I8 {
        /// `[rows, inputs]`
        codes: RowsRef<'a, i8>,
        /// `[rows, 1]`
        scales: RowsRef<'a, f32>,
    },
}

impl<'a> Activations<'a> {
    /// Their element type.
    pub fn dtype(&self) -> DType {
        match self {
            Activations::F32(_) => DType::F32,
            Activations::Bf16(_) => DType::BF16,
            Activations::I8 { .. } => DType::I8,
        }
    }

    /// Elements of a row.
    fn width(&self) -> usize {
        match self {
            Activations::F32(rows) => rows.width(),
            Activations::Bf16(rows) => rows.width(),
            Activations::I8 { codes, .. } => codes.width(),
        }
    }

    /// Returns true if there are at least this many rows.
    fn has_rows(&self, rows: usize) -> bool {
        match self {
            Activations::F32(x) => x.has_rows(rows),
            Activations::Bf16(x) => x.has_rows(rows),
            Activations::I8 { codes, scales } => codes.has_rows(rows) && scales.has_rows(rows),
        }
    }

    /// The rows starting at row `first`.
    fn rows_from(self, first: usize) -> Activations<'a> {
        match self {
            Activations::F32(x) => Activations::F32(x.starting_at(first)),
            Activations::Bf16(x) => Activations::Bf16(x.starting_at(first)),
            Activations::I8 { codes, scales } => {
                Activations::I8 { codes: codes.starting_at(first), scales: scales.starting_at(first) }
            }
        }
    }

    /// For a kernel that got activations it does not take.
    fn unexpected(&self, kernel: &dyn LinearKernel) -> Error {
        let found = format!("activations in {} for {}", self.dtype(), kernel.name());
        Error::internal(found, format!("one of {:?}", kernel.activation_dtypes()))
    }
}

/// Final step of a linear layer, applied to each sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Epilogue {
    /// `out = sum`
    Store,
    /// `out = max(sum, 0)²`
    Relu2,
    /// `out = out + sum`
    Accumulate,
}

/// Computes `x · weightᵀ` into the rows of `out`, `[rows, outputs]`.
///
/// # Errors
/// [`Error::Internal`] if `x` or `out` is too short or of another type than the kernel takes; plans are validated before
/// they run.
pub fn linear<O: FloatElement>(
    isa: Isa,
    x: Activations<'_>,
    weight: PackedWeight<'_>,
    epilogue: Epilogue,
    out: RowsMut<'_, O>,
) -> Result<()> {
    let RowsMut { data, stride, rows } = out;
    let LinearShape { outputs, inputs, .. } = weight.shape;
    let TileSize { mr, nr, mc } = weight.packing.tile_size();
    if rows == 0 {
        return Ok(());
    }
    // A checked sum: without it, hostile sizes would wrap and the unsafe code below write outside `out`.
    let out_len = (rows - 1).checked_mul(stride).and_then(|len| len.checked_add(outputs));
    if stride < outputs || out_len.is_none_or(|len| len > data.len()) || !x.has_rows(rows) || x.width() != inputs {
        let found = format!("{rows} rows of {} inputs to rows {stride} apart for {:?}", x.width(), weight.shape);
        return Err(Error::internal(found, "operands of the weight's shape"));
    }
    let row_blocks = rows.div_ceil(mc);
    let tasks = outputs.div_ceil(nr) * row_blocks;
    let out = Disjoint(data.as_mut_ptr());
    let task = |index: usize| -> Result<()> {
        let (panel, block) = (index / row_blocks, index % row_blocks);
        let first = block * mc;
        let count = mc.min(rows - first);
        let run = |sums: &mut [f32]| -> Result<()> {
            let sums = &mut sums[..count * nr];
            weight.packing.tile(isa, &weight, panel, x.rows_from(first), sums)?;
            let width = nr.min(outputs - panel * nr);
            for (row, sums) in sums.chunks_exact(nr).enumerate() {
                // SAFETY: rows and columns are inside `data` (checked above), and tasks write disjoint rectangles of it,
                // `count` rows by one panel.
                #[allow(unsafe_code)]
                let out = unsafe { std::slice::from_raw_parts_mut(out.at((first + row) * stride + panel * nr), width) };
                finish_row::<O>(isa, epilogue, sums, out);
            }
            Ok(())
        };
        if count <= mr { run(&mut [0f32; FEW_SUMS]) } else { run(&mut [0f32; MAX_SUMS]) }
    };
    if tasks == 1 || rows.saturating_mul(outputs).saturating_mul(inputs) < SERIAL_WORK {
        (0..tasks).try_for_each(task)
    } else {
        (0..tasks).into_par_iter().try_for_each(task)
    }
}

/// Packs the scales of one panel as `[columns, nr]`, as every kernel with scales keeps them.
fn pack_scales(nr: usize, rows: &[f32], columns: usize, panel: &mut [u8]) {
    let panel: &mut [f32] = bytemuck::cast_slice_mut(panel);
    for (lane, row) in rows.chunks_exact(columns).enumerate() {
        for (scale, lanes) in row.iter().zip(panel.chunks_exact_mut(nr)) {
            lanes[lane] = *scale;
        }
    }
}

/// The inverse of [`pack_scales`].
fn unpack_scales(nr: usize, panel: &[u8], columns: usize, rows: &mut [f32]) {
    let panel: &[f32] = bytemuck::cast_slice(panel);
    for (lane, row) in rows.chunks_exact_mut(columns).enumerate() {
        for (scale, lanes) in row.iter_mut().zip(panel.chunks_exact(nr)) {
            *scale = lanes[lane];
        }
    }
}

/// The start of an output that several tasks write disjoint parts of.
struct Disjoint<T>(*mut T);

// SAFETY: the pointer is only used through `at`, whose callers write disjoint elements; `T` is plain data.
#[allow(unsafe_code)]
unsafe impl<T: Send> Sync for Disjoint<T> {}

impl<T> Disjoint<T> {
    /// # Safety
    /// `offset` is inside the allocation.
    #[allow(unsafe_code)]
    unsafe fn at(&self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

dispatch! {
    /// One row's sums to its outputs; those past the outputs are padding.
    fn finish_row[O: FloatElement](epilogue: Epilogue, sums: &[f32], out: &mut [O]) {
        avx512 => finish_row_body::<O>,
        avx2 => finish_row_body::<O>,
        portable => finish_row_body::<O>,
    }
}

#[inline(always)]
fn finish_row_body<O: FloatElement>(epilogue: Epilogue, sums: &[f32], out: &mut [O]) {
    match epilogue {
        Epilogue::Store => out.iter_mut().zip(sums).for_each(|(o, s)| *o = O::from_f32(*s)),
        Epilogue::Relu2 => out.iter_mut().zip(sums).for_each(|(o, s)| {
            let positive = if *s < 0.0 { 0.0 } else { *s }; // NaN passes
            *o = O::from_f32(positive * positive);
        }),
        Epilogue::Accumulate => out.iter_mut().zip(sums).for_each(|(o, s)| *o = O::from_f32(o.to_f32() + *s)),
    }
}

#[cfg(test)]
mod tests;
