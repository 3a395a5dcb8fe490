//! Op descriptors, and what derives from them: the kind and attributes in a dump, operand checks, the result type, and
//! the properties that passes rely on.

use super::constant::Const;
use super::dim::{Dim, Sym};
use super::op::Op;
use super::value_type::Type;
use crate::tensor::DType;

/// The properties of an op that are independent of its place in a graph.
pub(super) struct OpDescriptor<'o> {
    kind: &'static str,
    attributes: String,
    operands: &'static [OperandSpec],
    fold: Option<Box<dyn Fn(Const) -> Const + 'o>>,
    /// `None` for values that state their type.
    result: Option<ResultRule<'o>>,
}

/// Checks beyond the operands' own specifications; returns the result's type.
type ResultRule<'o> = Box<dyn Fn(&Bound<'_>) -> Result<Type, String> + 'o>;

/// One operand of an op.
#[derive(Debug, Clone, Copy)]
pub struct OperandSpec {
    /// Its name in messages.
    pub name: &'static str,
    /// Its element types.
    pub accepts: Accepts,
    /// A name for each dimension, `None` for any shape. Dimensions of the same name are equal in all operands; `B` and
    /// `S` are the step's symbols.
    shape: Option<&'static [&'static str]>,
    /// When a BF16 plan rounds it to BF16.
    pub narrowing: Narrowing,
}

/// The element types an operand may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepts {
    /// Any type.
    Any,
    /// Floats.
    Floats,
    /// Codes of a quantized matrix.
    Codes,
    /// One type.
    Exactly(DType),
    /// The type of the operand at that index, which precedes this one.
    SameAs(usize),
}

/// When a BF16 plan rounds an operand to BF16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Narrowing {
    /// Never: it keeps its type.
    Never,
    /// Always.
    Always,
    /// Only if it is an unmodified checkpoint tensor.
    CheckpointTensors,
}

pub(super) const fn operand(name: &'static str, accepts: Accepts) -> OperandSpec {
    OperandSpec { name, accepts, shape: None, narrowing: Narrowing::Never }
}

impl OperandSpec {
    pub(super) const fn of(self, dims: &'static [&'static str]) -> OperandSpec {
        OperandSpec { shape: Some(dims), ..self }
    }

    pub(super) const fn of_any_shape(self) -> OperandSpec {
        OperandSpec { shape: None, ..self }
    }

    pub(super) const fn narrowed(self, narrowing: Narrowing) -> OperandSpec {
        OperandSpec { narrowing, ..self }
    }
}

impl<'o> OpDescriptor<'o> {
    /// A value without operands, which declares its own type.
    pub fn stated(kind: &'static str, attributes: String) -> OpDescriptor<'o> {
        OpDescriptor { kind, attributes, operands: &[], fold: None, result: None }
    }

    pub fn new(kind: &'static str, operands: &'static [OperandSpec]) -> OpDescriptor<'o> {
        OpDescriptor { kind, attributes: String::new(), operands, fold: None, result: None }
    }

    pub fn attributes(self, attributes: String) -> OpDescriptor<'o> {
        OpDescriptor { attributes, ..self }
    }

    /// For a unary op: how it folds a constant operand.
    pub fn folding(self, fold: impl Fn(Const) -> Const + 'o) -> OpDescriptor<'o> {
        OpDescriptor { fold: Some(Box::new(fold)), ..self }
    }

    pub fn result(self, rule: impl Fn(&Bound<'_>) -> Result<Type, String> + 'o) -> OpDescriptor<'o> {
        OpDescriptor { result: Some(Box::new(rule)), ..self }
    }
}

impl Op {
    /// The op's kind, for messages and dumps.
    pub fn kind(&self) -> &'static str {
        self.descriptor().kind
    }

    /// Its operands, in their order.
    pub fn operands(&self) -> &'static [OperandSpec] {
        self.descriptor().operands
    }

    /// Returns true if the op of a constant is a constant.
    pub fn folds(&self) -> bool {
        self.descriptor().fold.is_some()
    }

    /// The constant that the op of the constant `operand` folds to, if any.
    pub fn folded(&self, operand: &Const) -> Option<Const> {
        self.descriptor().fold.map(|fold| fold(operand.clone()))
    }

    /// Attributes for the text dump, with a leading space where there are any.
    pub(super) fn attributes(&self) -> String {
        let attributes = self.descriptor().attributes;
        if attributes.is_empty() { attributes } else { format!(" {attributes}") }
    }

    /// Infers the type of the op's value. `Input` and `Const` declare theirs and are not asked. The error says which
    /// operand is wrong, its type and the expected one.
    pub(super) fn infer(&self, operands: &[&Type]) -> Result<Type, String> {
        let OpDescriptor { operands: specs, result, .. } = self.descriptor();
        let result = result.ok_or("has no operands to infer a type from")?;
        result(&Bound::new(specs, operands)?)
    }
}

/// The operands of an op, each checked, and the named dimensions they bind.
pub(super) struct Bound<'t> {
    specs: &'static [OperandSpec],
    operands: &'t [&'t Type],
    /// Name, size, and the operand that bound it first.
    dims: Vec<(&'static str, Dim, usize)>,
}

impl<'t> Bound<'t> {
    fn new(specs: &'static [OperandSpec], operands: &'t [&'t Type]) -> Result<Bound<'t>, String> {
        if specs.len() != operands.len() {
            return Err(format!("takes {} operands, got {}", specs.len(), operands.len()));
        }
        let mut dims: Vec<(&'static str, Dim, usize)> = Vec::new();
        for (index, (spec, ty)) in specs.iter().zip(operands).enumerate() {
            let name = spec.name;
            if let Some(shape) = spec.shape
                && shape.len() != ty.shape.len()
            {
                let dimensions = if shape.len() == 1 { "1 dimension" } else { &format!("{} dimensions", shape.len()) };
                return Err(format!("{name} is {ty}, expected {dimensions}: [{}]", shape.join(", ")));
            }
            spec.accepts.check(name, ty, operands)?;
            for (dim_name, dim) in spec.shape.unwrap_or_default().iter().zip(&ty.shape) {
                let expected = match *dim_name {
                    "B" => Some(Dim::sym(Sym::B)),
                    "S" => Some(Dim::sym(Sym::S)),
                    named => dims.iter().find(|(other, ..)| *other == named).map(|(_, dim, _)| *dim),
                };
                match expected {
                    None => dims.push((dim_name, *dim, index)),
                    Some(expected) if expected == *dim => {}
                    Some(expected) => return Err(format!("{name} is {ty}: found {dim}, expected {expected}")),
                }
            }
        }
        Ok(Bound { specs, operands, dims })
    }

    pub fn operand(&self, index: usize) -> &Type {
        self.operands[index]
    }

    /// The dimension of that name.
    pub fn dim(&self, name: &str) -> Result<Dim, String> {
        self.found(name).map(|(_, dim, _)| *dim)
    }

    /// The size of the dimension of that name, which must be known at build time.
    pub fn known(&self, name: &str) -> Result<usize, String> {
        let (_, dim, operand) = self.found(name)?;
        let (spec, ty) = (self.specs[*operand], self.operands[*operand]);
        dim.as_fixed().ok_or_else(|| format!("{} is {ty}: {name} must be known at build time", spec.name))
    }

    /// Rejects a different size for the dimension of that name.
    pub fn expect(&self, name: &str, expected: Dim) -> Result<(), String> {
        let (_, dim, operand) = self.found(name)?;
        let (spec, ty) = (self.specs[*operand], self.operands[*operand]);
        if *dim == expected { Ok(()) } else { Err(format!("{} is {ty}: found {dim}, expected {expected}", spec.name)) }
    }

    /// A type whose dimensions are among those with names.
    pub fn typed<const N: usize>(&self, dtype: DType, dims: [&str; N]) -> Result<Type, String> {
        let shape = dims.iter().map(|name| self.dim(name)).collect::<Result<Vec<Dim>, String>>()?;
        Ok(Type { dtype, shape })
    }

    fn found(&self, name: &str) -> Result<&(&'static str, Dim, usize), String> {
        let found = self.dims.iter().find(|(other, ..)| *other == name);
        found.ok_or_else(|| format!("its descriptor has no dimension {name}"))
    }
}

impl Accepts {
    fn check(self, name: &str, ty: &Type, operands: &[&Type]) -> Result<(), String> {
        let (fits, expected) = match self {
            Accepts::Any => return Ok(()),
            Accepts::Floats => (ty.dtype.is_float(), "floats".to_owned()),
            Accepts::Codes => (ty.dtype.is_code(), "i8, i4 or f8".to_owned()),
            Accepts::Exactly(dtype) => (ty.dtype == dtype, dtype.to_string()),
            Accepts::SameAs(other) => (ty.dtype == operands[other].dtype, operands[other].dtype.to_string()),
        };
        if fits { Ok(()) } else { Err(format!("{name} is {ty}, expected {expected}")) }
    }
}
