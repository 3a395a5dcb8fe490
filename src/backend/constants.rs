//! Evaluates a graph's constants: weights, their quantized forms, and tables computed at build time.
//!
//! A lowering turns each [`Const`] it keeps into a [`ConstRows`]: a source of rows, the transforms applied to each
//! element, and the form in which the result is stored. `SourceRows` reads a few rows at a time and evaluates every
//! constant derived from them, so no weight is ever held in memory whole, and work that several files share is done
//! once. All backends pack the values evaluated here.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use safetensors::tensor::Dtype;

use crate::checkpoint::{Checkpoint, TensorView};
use crate::error::{Error, Result};
use crate::graph::{Const, Factors, Trig, Type};
use crate::quantize::Scheme;
use crate::tensor::DType;

/// A flattened constant: a matrix (a vector is one row) and the form it is stored in.
#[derive(Debug, Clone, PartialEq)]
pub struct ConstRows {
    source: RowSource,
    /// Applied in this order.
    transforms: Vec<RowTransform>,
    form: RowForm,
    rows: usize,
    columns: usize,
}

/// Source of a constant's rows.
#[derive(Debug, Clone, PartialEq)]
pub enum RowSource {
    /// Checkpoint tensors of equal width, concatenated along the rows.
    Tensors(Vec<String>),
    /// Computed: one row per position, see [`Const::RotaryTable`].
    RotaryTable {
        /// Cosine or sine.
        trig: Trig,
        /// Base of the frequencies.
        theta: f64,
        /// Rotating dimensions of a head.
        rotary_dim: usize,
    },
}

/// An elementwise operation in FP32.
#[derive(Debug, Clone, PartialEq)]
pub enum RowTransform {
    /// Adds a scalar.
    Add(f32),
    /// Multiplies each column or row by its factor.
    Scale(Factors),
    /// Rounds to BF16, ties to even.
    RoundToBf16,
    /// Rounds to F16, ties to even.
    RoundToF16,
}

/// Form in which a constant's rows are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowForm {
    /// The values themselves.
    Values,
    /// The codes of each row.
    Codes(Scheme),
    /// The scales of each row's codes.
    Scales(Scheme),
}

impl ConstRows {
    /// Flattens `expr`, a constant of type `ty`.
    ///
    /// # Errors
    /// The part of the expression that cannot be flattened or does not match `ty`; the caller prefixes the constant's
    /// name.
    pub fn new(expr: &Const, ty: &Type) -> Result<ConstRows, String> {
        let dims: Option<Vec<usize>> = ty.shape.iter().map(|dim| dim.as_fixed()).collect();
        let (rows, width) = match dims.as_deref() {
            Some([width]) => (1, *width),
            Some([rows, width]) => (*rows, *width),
            _ => return Err(format!("weights have one or two known dimensions, this is {ty}")),
        };
        let (matrix, form, columns) = match expr {
            Const::Codes(matrix, scheme) => (&**matrix, RowForm::Codes(*scheme), width),
            Const::Scales { matrix, scheme, columns } => {
                if width != scheme.blocks(*columns) {
                    return Err(format!(
                        "{columns} columns have {} scales, not the {width} of {ty}",
                        scheme.blocks(*columns)
                    ));
                }
                (&**matrix, RowForm::Scales(*scheme), *columns)
            }
            values => (values, RowForm::Values, width),
        };
        let (source, transforms) = flattened(matrix)?;
        if let RowSource::RotaryTable { rotary_dim, .. } = &source
            && columns != rotary_dim / 2
        {
            return Err(format!(
                "a table of {rotary_dim} rotary dims has rows of {}, not of {columns}",
                rotary_dim / 2
            ));
        }
        if columns == 0 {
            return Err("its rows are empty".into());
        }
        let fits = |transform: &RowTransform| match transform {
            RowTransform::Scale(factors) => factors.fit(rows, columns),
            RowTransform::Add(_) | RowTransform::RoundToBf16 | RowTransform::RoundToF16 => true,
        };
        if !transforms.iter().all(fits) {
            return Err(format!("factors of another shape than {rows} x {columns}"));
        }
        Ok(ConstRows { source, transforms, form, rows, columns })
    }

    /// Source of its rows.
    pub fn source(&self) -> &RowSource {
        &self.source
    }

    /// Form in which its rows are stored.
    pub fn form(&self) -> RowForm {
        self.form
    }

    /// The elements of the checkpoint that its rows are computed from.
    pub fn unquantized(&self) -> ConstRows {
        ConstRows { transforms: Vec::new(), form: RowForm::Values, ..self.clone() }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns of the source matrix.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Number of values per evaluated row: its columns, or its scales.
    pub fn width(&self) -> usize {
        match self.form {
            RowForm::Values | RowForm::Codes(_) => self.columns,
            RowForm::Scales(scheme) => scheme.blocks(self.columns),
        }
    }

    /// Number of values in all evaluated rows, saturating at `usize::MAX`.
    pub fn elements(&self) -> usize {
        self.rows.saturating_mul(self.width())
    }

    /// Evaluates rows from `first` on until `out`, `[rows, width]`, is full.
    ///
    /// # Errors
    /// As [`SourceRows::read`].
    pub fn evaluate(&self, checkpoint: &Checkpoint, first: usize, out: &mut [f32]) -> Result<()> {
        let rows = first..first + out.len() / self.width();
        let mut source = SourceRows::read(&self.source, checkpoint, rows, self.columns)?;
        out.copy_from_slice(&source.evaluate(self));
        Ok(())
    }
}

/// Source of a matrix, and the transforms of its elements in order.
fn flattened(expr: &Const) -> Result<(RowSource, Vec<RowTransform>), String> {
    let then = |inner: &Const, transform: RowTransform| {
        let (source, mut transforms) = flattened(inner)?;
        transforms.push(transform);
        Ok((source, transforms))
    };
    match expr {
        Const::Tensor(name) => Ok((RowSource::Tensors(vec![name.clone()]), Vec::new())),
        Const::AddScalar(inner, scalar) => then(inner, RowTransform::Add(*scalar)),
        Const::Scaled(inner, factors) => then(inner, RowTransform::Scale(factors.clone())),
        Const::Cast(inner, DType::F32) => flattened(inner),
        Const::Cast(inner, DType::BF16) => then(inner, RowTransform::RoundToBf16),
        Const::Cast(inner, DType::F16) => then(inner, RowTransform::RoundToF16),
        Const::Cast(_, dtype @ (DType::I32 | DType::I8 | DType::I4 | DType::F8 | DType::Bool)) => {
            Err(format!("`{expr}` rounds to {dtype}, which is not a float"))
        }
        Const::ConcatRows(parts) => {
            let mut parts = parts.iter().map(flattened);
            let (first, transforms) = parts.next().ok_or("a stack of no matrices")??;
            let not_stacked = || format!("`{expr}` does not stack tensors that are transformed alike");
            let RowSource::Tensors(mut names) = first else { return Err(not_stacked()) };
            for part in parts {
                match part? {
                    (RowSource::Tensors(more), same) if same == transforms => names.extend(more),
                    _ => return Err(not_stacked()),
                }
            }
            Ok((RowSource::Tensors(names), transforms))
        }
        Const::RotaryTable { trig, theta, rotary_dim, .. } => {
            Ok((RowSource::RotaryTable { trig: *trig, theta: *theta, rotary_dim: *rotary_dim }, Vec::new()))
        }
        Const::Codes(..) | Const::Scales { .. } => Err(format!("`{expr}` is a part of another constant")),
    }
}

/// A few rows of a source, with everything evaluated from them so far.
pub(super) struct SourceRows<'c> {
    /// Index of the first row.
    first: usize,
    columns: usize,
    /// `[rows, columns]`
    values: Vec<f32>,
    /// The rows as stored in the checkpoint, one entry per tensor; empty for computed rows.
    stored: Vec<(TensorView<'c>, Cow<'c, [u8]>)>,
    quantized: Vec<Quantized>,
}

/// Codes and scales of transformed rows.
struct Quantized {
    transforms: Vec<RowTransform>,
    scheme: Scheme,
    /// `[rows, columns]`, codes as numbers.
    codes: Vec<f32>,
    /// `[rows, blocks]`
    scales: Vec<f32>,
}

impl<'c> SourceRows<'c> {
    /// Reads rows of a source with `columns` columns.
    ///
    /// # Errors
    /// [`Error::Format`] naming the tensor and position if a weight is NaN or infinite.
    pub fn read(
        source: &RowSource,
        checkpoint: &'c Checkpoint,
        rows: Range<usize>,
        columns: usize,
    ) -> Result<SourceRows<'c>> {
        let mut values = vec![0f32; rows.len() * columns];
        let mut stored = Vec::new();
        let mut quantized = Vec::new();
        match source {
            RowSource::Tensors(names) => {
                for scheme in checkpoint.rounded_schemes(names) {
                    let (mut codes, mut scales) = (values.clone(), vec![0f32; rows.len() * scheme.blocks(columns)]);
                    checkpoint.read_rounded(names, scheme, rows.clone(), &mut codes, &mut scales)?;
                    quantized.push(Quantized { transforms: Vec::new(), scheme, codes, scales });
                }
                let mut above = 0;
                for name in names {
                    let view = checkpoint.tensor(name)?;
                    if !view.elements().is_multiple_of(columns) {
                        let (shape, wanted) = (view.shape, format!("rows of {columns} elements"));
                        return Err(Error::internal(format!("tensor `{name}` has shape {shape:?}"), wanted));
                    }
                    let below = above + view.elements() / columns;
                    let (first, end) = (rows.start.max(above), rows.end.min(below));
                    if first < end {
                        let bytes = view.raw((first - above) * columns..(end - above) * columns);
                        let out = &mut values[(first - rows.start) * columns..(end - rows.start) * columns];
                        view.dtype.decode(&bytes, out);
                        check_finite(&view, checkpoint, first - above, columns, out)?;
                        stored.push((view, bytes));
                    }
                    above = below;
                }
                if rows.end > above {
                    return Err(Error::internal(
                        format!("row {} of {names:?} is read", rows.end),
                        format!("{above} rows"),
                    ));
                }
            }
            RowSource::RotaryTable { trig, theta, rotary_dim } => {
                for (position, row) in rows.clone().zip(values.chunks_exact_mut(columns)) {
                    rotary_row(*trig, *theta, *rotary_dim, position, row);
                }
            }
        }
        Ok(SourceRows { first: rows.start, columns, values, stored, quantized })
    }

    /// Evaluates a constant of this source, `[rows, width]`. Codes are returned as numbers; [`Scheme::bits`] gives
    /// their bits.
    pub fn evaluate(&mut self, constant: &ConstRows) -> Cow<'_, [f32]> {
        match constant.form {
            RowForm::Values => self.transformed(&constant.transforms),
            RowForm::Codes(scheme) => Cow::Borrowed(&self.quantized(&constant.transforms, scheme).codes),
            RowForm::Scales(scheme) => Cow::Borrowed(&self.quantized(&constant.transforms, scheme).scales),
        }
    }

    /// The rows as stored in the checkpoint, one entry per tensor; empty for computed rows.
    pub fn into_stored(self) -> Vec<(TensorView<'c>, Cow<'c, [u8]>)> {
        self.stored
    }

    fn transformed(&self, transforms: &[RowTransform]) -> Cow<'_, [f32]> {
        let transforms = match transforms {
            // Values of a type are fixed points of rounding to it.
            [RowTransform::RoundToBf16, rest @ ..] if self.is_stored_as(DType::BF16) => rest,
            [RowTransform::RoundToF16, rest @ ..] if self.is_stored_as(DType::F16) => rest,
            all => all,
        };
        let mut values = Cow::Borrowed(self.values.as_slice());
        for transform in transforms {
            transform.apply(self.first, self.columns, values.to_mut());
        }
        values
    }

    fn is_stored_as(&self, dtype: DType) -> bool {
        !self.stored.is_empty() && self.stored.iter().all(|(view, _)| view.dtype == dtype)
    }

    /// Codes and scales, computed on first use.
    fn quantized(&mut self, transforms: &[RowTransform], scheme: Scheme) -> &Quantized {
        let known = self.quantized.iter().position(|known| known.transforms == transforms && known.scheme == scheme);
        let index = known.unwrap_or_else(|| {
            let mut codes = self.transformed(transforms).into_owned();
            let mut scales = vec![0f32; codes.len() / self.columns * scheme.blocks(self.columns)];
            scheme.quantize(self.columns, &mut codes, &mut scales);
            self.quantized.push(Quantized { transforms: transforms.to_vec(), scheme, codes, scales });
            self.quantized.len() - 1
        });
        &self.quantized[index]
    }
}

impl RowTransform {
    /// Applies it to rows from `first` on.
    fn apply(&self, first: usize, columns: usize, values: &mut [f32]) {
        match self {
            RowTransform::Add(scalar) => values.iter_mut().for_each(|value| *value += scalar),
            RowTransform::Scale(factors) => factors.apply(first, columns, values),
            RowTransform::RoundToBf16 => values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
            RowTransform::RoundToF16 => values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
        }
    }
}

/// Rejects `values`, rows of a tensor starting at row `first`, if one of them is NaN or infinite.
///
/// # Errors
/// [`Error::Format`] naming the tensor and position.
fn check_finite(
    view: &TensorView<'_>,
    checkpoint: &Checkpoint,
    first: usize,
    columns: usize,
    values: &[f32],
) -> Result<()> {
    // Branch-free over the elements, so that it vectorizes; the search for the culprit runs only on failure.
    const EXPONENT: u32 = 0x7f80_0000;
    if !values.iter().fold(false, |any, value| any | (value.to_bits() & EXPONENT == EXPONENT)) {
        return Ok(());
    }
    let Some(bad) = values.iter().position(|value| !value.is_finite()) else { return Ok(()) };
    let (row, column) = (first + bad / columns, bad % columns);
    let (name, value) = (view.name, values[bad]);
    let detail = format!("tensor `{name}` has {value} at row {row}, column {column}; the checkpoint is damaged");
    Err(Error::format(checkpoint.path(), detail))
}

/// Safetensors dtype that stores elements of `dtype`. The format has no 4-bit integers, so a pair of them is one `U8`.
pub fn stored_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I32 => Dtype::I32,
        DType::I8 => Dtype::I8,
        DType::I4 => Dtype::U8,
        DType::F8 => Dtype::F8_E4M3,
        DType::Bool => Dtype::BOOL,
    }
}

/// Fills `out` with the cosine or sine of `position · theta^(−2i / rotary_dim)`. Frequency and angle are rounded to
/// FP32 as in transformers; the function itself is evaluated in double precision.
fn rotary_row(trig: Trig, theta: f64, rotary_dim: usize, position: usize, out: &mut [f32]) {
    for (i, value) in out.iter_mut().enumerate() {
        let exponent = (2 * i) as f32 / rotary_dim as f32;
        let frequency = 1.0 / theta.powf(f64::from(exponent)) as f32;
        let angle = f64::from(position as f32 * frequency);
        *value = match trig {
            Trig::Cos => angle.cos(),
            Trig::Sin => angle.sin(),
        } as f32;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::graph::Dim;

    const COLUMNS: usize = 192;

    fn checkpoint() -> Checkpoint {
        Checkpoint::open(Path::new("tests/data/tiny-chat")).unwrap()
    }

    fn projection(name: &str) -> Const {
        Const::Tensor(format!("model.layers.0.self_attn.{name}_proj.weight"))
    }

    fn matrix(rows: usize, columns: usize) -> Type {
        Type::new(DType::F32, [Dim::fixed(rows), Dim::fixed(columns)])
    }

    fn plain(expr: &Const, rows: usize, columns: usize) -> ConstRows {
        ConstRows::new(expr, &matrix(rows, columns)).unwrap()
    }

    fn evaluated(constant: &ConstRows, first: usize, rows: usize) -> Vec<f32> {
        let mut out = vec![0f32; rows * constant.width()];
        constant.evaluate(&checkpoint(), first, &mut out).unwrap();
        out
    }

    #[test]
    fn rotary_angles_follow_the_formula() {
        let (mut cos, mut sin) = ([0f32; 2], [0f32; 2]);
        rotary_row(Trig::Cos, 10000.0, 4, 3, &mut cos);
        rotary_row(Trig::Sin, 10000.0, 4, 3, &mut sin);
        assert_eq!(cos, [3f64.cos() as f32, 0.03f32.cos()]);
        assert_eq!(sin[0], 3f64.sin() as f32);
        assert!((sin[1] - 0.029_995_5).abs() < 1e-7);
    }

    #[test]
    fn transforms_apply_in_order_and_codes_are_of_what_they_give() {
        let narrow = Const::Cast(Box::new(Const::AddScalar(Box::new(projection("q")), 1.0)), DType::BF16);
        let values = evaluated(&plain(&projection("q"), COLUMNS, COLUMNS), 5, 3);
        let expected: Vec<f32> = values.iter().map(|value| bf16::from_f32(value + 1.0).to_f32()).collect();
        assert_ne!(expected, values);
        assert_eq!(evaluated(&plain(&narrow, COLUMNS, COLUMNS), 5, 3), expected);
        let scheme = Scheme::INT4;
        let (mut codes, mut scales) = (expected, vec![0f32; 3 * scheme.blocks(COLUMNS)]);
        scheme.quantize(COLUMNS, &mut codes, &mut scales);
        let of_codes = Const::Codes(Box::new(narrow.clone()), scheme);
        assert_eq!(evaluated(&plain(&of_codes, COLUMNS, COLUMNS), 5, 3), codes);
        let of_scales = Const::Scales { matrix: Box::new(narrow), scheme, columns: COLUMNS };
        assert_eq!(evaluated(&plain(&of_scales, COLUMNS, scheme.blocks(COLUMNS)), 5, 3), scales);
    }

    #[test]
    fn a_stack_is_read_across_its_seams() {
        let stack = |names: &[&str]| Const::ConcatRows(names.iter().map(|name| projection(name)).collect());
        let nested = Const::ConcatRows(vec![projection("q"), stack(&["k", "v"])]);
        let flat = plain(&stack(&["q", "k", "v"]), 3 * COLUMNS, COLUMNS);
        assert_eq!(plain(&nested, 3 * COLUMNS, COLUMNS), flat);
        let all = evaluated(&flat, 0, 3 * COLUMNS);
        let parts = ["q", "k", "v"].map(|name| evaluated(&plain(&projection(name), COLUMNS, COLUMNS), 0, COLUMNS));
        assert_eq!(all, parts.concat());
        assert_eq!(
            evaluated(&flat, COLUMNS - 1, COLUMNS + 2),
            all[(COLUMNS - 1) * COLUMNS..(2 * COLUMNS + 1) * COLUMNS]
        );
    }

    #[test]
    fn what_has_no_plain_form_is_refused() {
        let codes = Const::Codes(Box::new(projection("q")), Scheme::INT8);
        let scales = |columns| Const::Scales { matrix: Box::new(projection("q")), scheme: Scheme::INT4, columns };
        let table = || Const::RotaryTable { trig: Trig::Cos, theta: 1e4, rotary_dim: 8, positions: 4 };
        for (expr, ty, expected) in [
            (Const::AddScalar(Box::new(codes.clone()), 1.0), matrix(4, 4), "is a part of another constant"),
            (Const::Cast(Box::new(projection("q")), DType::I8), matrix(4, 4), "rounds to i8"),
            (
                Const::ConcatRows(vec![projection("q"), Const::AddScalar(Box::new(projection("k")), 1.0)]),
                matrix(4, 4),
                "does not stack",
            ),
            (Const::ConcatRows(vec![table(), table()]), matrix(8, 4), "does not stack"),
            (Const::ConcatRows(vec![]), matrix(8, 4), "a stack of no matrices"),
            (scales(300), matrix(4, 4), "300 columns have 3 scales, not the 4"),
            (table(), matrix(4, 3), "rows of 4, not of 3"),
            (projection("q"), matrix(4, 0), "empty"),
            (projection("q"), Type::new(DType::F32, [Dim::tokens(), 4.into()]), "known dimensions"),
        ] {
            let error = ConstRows::new(&expr, &ty).unwrap_err();
            assert!(error.contains(expected), "{expr}: {error}");
        }
    }

    #[test]
    fn a_shape_that_is_not_the_checkpoints_is_an_internal_error() {
        let checkpoint = checkpoint();
        for (rows, columns) in [(COLUMNS + 1, COLUMNS), (COLUMNS, COLUMNS - 1)] {
            let mut out = vec![0f32; rows * columns];
            let error = plain(&projection("q"), rows, columns).evaluate(&checkpoint, 0, &mut out).unwrap_err();
            assert!(matches!(error, Error::Internal { .. }), "{error}");
            assert!(error.to_string().contains("q_proj"), "{error}");
        }
    }
}
