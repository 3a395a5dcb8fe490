//! Which instructions this machine has, and how a kernel is compiled once for each set.
use std::fmt;

/// A set of instructions that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Portable,
    Avx2,
    Avx512,
    Avx512Bf16,
}

/// An instruction set known to be present: one is only made by [`Isa::detect`] and [`Isa::available`], which is what
/// makes the calls of `kernel!` sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Level);

impl Isa {
    /// The best set this machine has.
    pub fn detect() -> Isa {
        Isa::available().into_iter().max().unwrap_or(Isa(Level::Portable))
    }

    /// Every set this machine has, plainest first.
    pub fn available() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut sets = vec![Isa(Level::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma");
            let avx512 = avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
            if avx2 {
                sets.push(Isa(Level::Avx2));
            }
            if avx512 {
                sets.push(Isa(Level::Avx512));
            }
            if avx512 && has!("avx512bf16") {
                sets.push(Isa(Level::Avx512Bf16));
            }
        }
        sets
    }

    /// The set of this name among those this machine has.
    pub fn by_name(name: &str) -> Option<Isa> {
        Isa::available().into_iter().find(|isa| isa.to_string() == name)
    }

    /// AVX2 and FMA.
    pub(super) fn has_avx2(self) -> bool {
        self.0 >= Level::Avx2
    }

    /// AVX-512 F, BW, DQ, VL, beside AVX2 and FMA.
    pub(super) fn has_avx512(self) -> bool {
        self.0 >= Level::Avx512
    }

    /// AVX-512 BF16, beside the others.
    pub(super) fn has_avx512_bf16(self) -> bool {
        self.0 >= Level::Avx512Bf16
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self.0 {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512-bf16",
        })
    }
}

/// Defines `fn $name[G: Bound](isa, args…)`, which runs `$body::<G, FMA>(args…)` compiled for the instructions `isa`
/// has. `$body` is an `#[inline(always)]` function generic over `const FMA: bool`; it is safe code that the
/// compiler vectorizes. `FMA` says whether `mul_add` is one instruction.
macro_rules! kernel {
    ($(#[$doc:meta])* pub fn $name:ident[$($g:ident: $bound:path),*]($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub fn $name<$($g: $bound),*>(isa: crate::backend::cpu::kernels::isa::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512<$($g: $bound),*>($($arg: $ty),*) {
                    $body::<$($g,)* true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2<$($g: $bound),*>($($arg: $ty),*) {
                    $body::<$($g,)* true>($($arg),*)
                }
                if isa.has_avx512() {
                    // SAFETY: an `Isa` is only made after its features were detected.
                    #[allow(unsafe_code)]
                    return unsafe { avx512($($arg),*) };
                }
                if isa.has_avx2() {
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    return unsafe { avx2($($arg),*) };
                }
            }
            let _ = isa;
            $body::<$($g,)* false>($($arg),*)
        }
    };
}
pub(crate) use kernel;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_the_best_is_last() {
        let sets = Isa::available();
        assert!(sets.is_sorted());
        assert_eq!(sets.last(), Some(&Isa::detect()));
        for isa in sets {
            assert_eq!(Isa::by_name(&isa.to_string()), Some(isa));
        }
        assert_eq!(Isa::by_name("amx"), None);
    }
}
