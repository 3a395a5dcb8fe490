//! The typed intermediate representation of one forward step. Values are in static single assignment: every node
//! defines one value from earlier ones, and its type is inferred when it is added, so a graph that exists
//! type-checks.

mod constant;
mod descriptor;
mod dim;
mod op;
mod value_type;

use std::fmt;

pub use constant::{Const, Factors, Trig};
pub use descriptor::{Accepts, Narrowing, OperandSpec};
pub use dim::{Dim, Sym};
pub use op::Op;
pub use value_type::{Input, Type};

use crate::error::{Error, Result};

/// A value of one graph; meaningless outside the graph that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(u32);

impl Value {
    /// Position of the defining node in [`Graph::nodes`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// An operation, its operands, and the value it defines.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The operation.
    pub op: Op,
    /// Its operands, in the op's order; all defined earlier.
    pub operands: Vec<Value>,
    /// The value's name, unique in the graph: `layers.3.mlp.up`.
    pub name: String,
    /// The value's type.
    pub ty: Type,
}

/// One forward step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Graph {
    nodes: Vec<Node>,
    outputs: Vec<Value>,
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Graph {
        Graph::default()
    }

    /// Adds a value that the step supplies.
    pub fn input(&mut self, name: impl Into<String>, input: Input, ty: Type) -> Value {
        self.insert(Op::Input(input), Vec::new(), name.into(), ty)
    }

    /// Adds a value known at build time; `ty` is the type that the expression evaluates to.
    pub fn constant(&mut self, name: impl Into<String>, expr: Const, ty: Type) -> Value {
        self.insert(Op::Const(expr), Vec::new(), name.into(), ty)
    }

    /// Adds an operation.
    ///
    /// # Errors
    /// [`Error::Graph`] naming the op, the value and the operand of the wrong type.
    pub fn add(&mut self, name: impl Into<String>, op: Op, operands: &[Value]) -> Result<Value> {
        let name = name.into();
        let fail = |detail: String| Error::Graph { op: op.kind().into(), name: name.clone(), detail };
        let types = operands
            .iter()
            .map(|v| {
                self.nodes.get(v.index()).map(|n| &n.ty).ok_or_else(|| fail(format!("operand {v} is not defined")))
            })
            .collect::<Result<Vec<&Type>>>()?;
        let ty = op.infer(&types).map_err(fail)?;
        Ok(self.insert(op, operands.to_vec(), name, ty))
    }

    fn insert(&mut self, op: Op, operands: Vec<Value>, name: String, ty: Type) -> Value {
        self.nodes.push(Node { op, operands, name, ty });
        Value(self.nodes.len() as u32 - 1)
    }

    /// Marks a value as an output of the step. Caches updated by the step are outputs too.
    pub fn output(&mut self, value: Value) {
        self.outputs.push(value);
    }

    /// All nodes in order of definition; operands come before their users.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node that defines a value.
    pub fn node(&self, value: Value) -> &Node {
        &self.nodes[value.index()]
    }

    /// Every value with its node, in order of definition.
    pub fn iter(&self) -> impl Iterator<Item = (Value, &Node)> {
        self.nodes.iter().enumerate().map(|(i, n)| (Value(i as u32), n))
    }

    /// The results of the step.
    pub fn outputs(&self) -> &[Value] {
        &self.outputs
    }

    /// For each value, by index, the values that use it, in order of definition.
    pub fn users(&self) -> Vec<Vec<Value>> {
        let mut users = vec![Vec::new(); self.nodes.len()];
        for (value, node) in self.iter() {
            for operand in &node.operands {
                users[operand.index()].push(value);
            }
        }
        users
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

/// The text dump: one line a value, `%3 layers.0.qkv: f32[B·T, 576] = linear(%1, %2)`.
impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (value, node) in self.iter() {
            write!(f, "{value} {}: {} = {}{}", node.name, node.ty, node.op.kind(), node.op.attributes())?;
            if !node.operands.is_empty() {
                let operands: Vec<String> = node.operands.iter().map(Value::to_string).collect();
                write!(f, "({})", operands.join(", "))?;
            }
            writeln!(f)?;
        }
        let outputs: Vec<String> = self.outputs.iter().map(Value::to_string).collect();
        writeln!(f, "return {}", outputs.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    #[test]
    fn a_mismatch_names_op_value_and_types() {
        let mut g = Graph::new();
        let x = g.input("x", Input::TokenIds, Type::new(DType::F32, [Dim::tokens(), 8.into()]));
        let w = g.constant("w", Const::Tensor("w".into()), Type::new(DType::F32, [4.into(), 9.into()]));
        let error = g.add("layers.0.up", Op::Linear, &[x, w]).unwrap_err().to_string();
        assert_eq!(error, "graph: op linear (layers.0.up): weight is f32[4, 9]: found 9, expected 8");
    }

    /// Every op that has operands; `FakeQuantize`, `Columns`, `RotaryAngle` and `Rotary` with attributes that no operand fits.
    fn ops() -> Vec<Op> {
        vec![
            Op::AddScalar(1.0),
            Op::Cast(DType::BF16),
            Op::Gather,
            Op::LayerNorm { eps: 1e-5 },
            Op::Linear,
            Op::QuantizedLinear { block: None },
            Op::FakeQuantize { code: DType::F8, scale: 0.0 },
            Op::QuantizedLinear { block: Some(2) },
            Op::Columns { start: 7, width: 2 },
            Op::RotaryAngle { trig: Trig::Cos, theta: 1e4, rotary_dim: 3 },
            Op::Rotary { head_dim: 3 },
            Op::CacheUpdate,
            Op::Attention { scale: 1.0 },
            Op::Relu2,
            Op::Add,
        ]
    }

    #[test]
    fn every_op_refuses_wrong_operands() {
        let mut g = Graph::new();
        let ids = g.input("ids", Input::TokenIds, Type::new(DType::I32, [Dim::tokens()]));
        let x = g.input("x", Input::TokenIds, Type::new(DType::F32, [Dim::tokens(), 8.into()]));
        for op in ops() {
            for operands in [&[][..], &[ids], &[x, ids], &[x, ids, ids], &[ids, ids, ids, ids]] {
                assert!(g.add("v", op.clone(), operands).is_err(), "{op:?} took {operands:?}");
            }
        }
    }

    #[test]
    fn descriptors_refer_to_operands_before_and_have_kinds_of_their_own() {
        let mut kinds = std::collections::HashSet::from(["input", "const"]);
        for op in ops() {
            let operands = op.operands();
            assert!(!operands.is_empty() && (kinds.insert(op.kind()) || op.kind() == "quantized_linear"), "{op:?}");
            for (index, operand) in operands.iter().enumerate() {
                assert!(!matches!(operand.accepts, Accepts::SameAs(other) if other >= index), "{op:?}");
            }
            assert!(!op.folds() || operands.len() == 1, "{op:?} folds one operand");
        }
        assert_eq!(kinds.len(), 16, "the list above has every op");
    }

    #[test]
    fn equal_names_are_equal_dimensions() {
        let mut g = Graph::new();
        let f32 = |dims: &[Dim]| Type::new(DType::F32, dims.iter().copied());
        let (b, s, four) = (Dim::sym(Sym::B), Dim::sym(Sym::S), Dim::fixed(4));
        let past = g.input("past", Input::PastTokens, Type::new(DType::I32, [b]));
        let new = g.input("new", Input::TokenIds, f32(&[Dim::tokens(), 8.into()]));
        let cache = g.input("cache", Input::KeyCache(0), f32(&[b, 2.into(), s, four]));
        let other = g.input("other", Input::KeyCache(0), f32(&[s, 2.into(), s, four]));
        let wide = g.input("wide", Input::KeyCache(0), f32(&[b, 3.into(), s, four]));
        let updated = g.add("updated", Op::CacheUpdate, &[cache, new, past]).unwrap();
        assert_eq!(g.node(updated).ty, g.node(cache).ty);
        for (operands, expected) in [
            ([other, new, past], "cache is f32[S, 2, S, 4]: found S, expected B"),
            ([wide, new, past], "new is f32[B·T, 8], which does not match a position of f32[B, 3, S, 4]"),
            ([new, new, past], "cache is f32[B·T, 8], expected 4 dimensions: [B, heads, S, head_dim]"),
        ] {
            let error = g.add("v", Op::CacheUpdate, &operands).unwrap_err().to_string();
            assert!(error.ends_with(expected), "{error}");
        }
        let error = g.add("v", Op::Attention { scale: 1.0 }, &[new, cache, wide, past]).unwrap_err().to_string();
        assert!(error.ends_with("values is f32[B, 3, S, 4]: found 3, expected 2"), "{error}");
    }

    #[test]
    fn dump_reads_as_written() {
        let mut g = Graph::new();
        let x = g.input("x", Input::TokenIds, Type::new(DType::F32, [Dim::tokens(), 8.into()]));
        let y = g.add("half", Op::Columns { start: 4, width: 4 }, &[x]).unwrap();
        g.output(y);
        assert_eq!(
            g.to_string(),
            "%0 x: f32[B·T, 8] = input TokenIds\n%1 half: f32[B·T, 4] = columns 4..8(%0)\nreturn %1\n"
        );
    }
}
