//! Symbolic sizes: products of a constant and the step's unknowns.

use std::fmt;

/// A size unknown until the step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sym {
    /// Sequences in the step.
    B,
    /// New tokens per sequence.
    T,
    /// KV capacity of a sequence in tokens.
    S,
    /// Requested rows of logits.
    R,
}

const SYMS: [Sym; 4] = [Sym::B, Sym::T, Sym::S, Sym::R];

/// A dimension: `factor · B^b · T^t · S^s · R^r`. A step's tokens are `B·T`; where sequences add unequal numbers
/// of tokens (the CPU plan), `B·T` stands for their sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dim {
    factor: usize,
    powers: [u8; 4],
}

impl Dim {
    /// A known size.
    pub const fn fixed(size: usize) -> Dim {
        Dim { factor: size, powers: [0; 4] }
    }

    /// A single symbol.
    pub const fn sym(sym: Sym) -> Dim {
        let mut powers = [0; 4];
        powers[sym as usize] = 1;
        Dim { factor: 1, powers }
    }

    /// New tokens of the step, over all its sequences: `B·T`.
    pub const fn tokens() -> Dim {
        Dim { factor: 1, powers: [1, 1, 0, 0] }
    }

    /// The size, if it has no symbol.
    pub fn as_fixed(self) -> Option<usize> {
        (self.powers == [0; 4]).then_some(self.factor)
    }
}

impl From<usize> for Dim {
    fn from(size: usize) -> Dim {
        Dim::fixed(size)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.factor != 1 || self.powers == [0; 4] {
            parts.push(self.factor.to_string());
        }
        for (sym, power) in SYMS.iter().zip(self.powers) {
            parts.extend((0..power).map(|_| format!("{sym:?}")));
        }
        f.write_str(&parts.join("·"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_as_a_product() {
        assert_eq!(Dim::fixed(1).to_string(), "1");
        assert_eq!(Dim::fixed(128).to_string(), "128");
        assert_eq!(Dim::tokens().to_string(), "B·T");
        assert_eq!(Dim::sym(Sym::S).to_string(), "S");
        assert_eq!(Dim::tokens().as_fixed(), None);
    }
}
