//! CPU features, and the one macro that compiles a function for several sets of them and picks one at run time.
//!
//! Features do not nest: AVX-512 BF16, AVX-512 VNNI and AVX-VNNI each exist without the others. A function therefore
//! asks for the features it uses, never for "at least AVX2".

use std::fmt;
use std::sync::OnceLock;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result, clip};

/// The environment variable that names the set to use in place of the best one, to test or to compare.
pub const CPU_VARIABLE: &str = "AOTRON_CPU";

/// A set of CPU features. Any set can be named, whatever this machine has: a plan is built for one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct CpuFeatures(u8);

impl CpuFeatures {
    /// No feature beyond what the compiler's baseline has.
    pub const PORTABLE: CpuFeatures = CpuFeatures(0);
    /// AVX2 and FMA.
    pub const AVX2: CpuFeatures = CpuFeatures(1);
    /// AVX-512 F, BW, DQ and VL.
    pub const AVX512: CpuFeatures = CpuFeatures(2);
    /// AVX-512 BF16: dot products of BF16 pairs.
    pub const AVX512_BF16: CpuFeatures = CpuFeatures(4);
    /// AVX-512 VNNI: dot products of four bytes.
    pub const AVX512_VNNI: CpuFeatures = CpuFeatures(8);

    /// The sets that have a name, plainest first. A machine is taken for the last one that it has all of.
    const NAMED: [(&'static str, CpuFeatures); 5] = [
        ("portable", Self::PORTABLE),
        ("avx2", Self::AVX2),
        ("avx512", Self::AVX2.and(Self::AVX512)),
        ("avx512-vnni", Self::AVX2.and(Self::AVX512).and(Self::AVX512_VNNI)),
        // Every CPU with BF16 products has VNNI too.
        ("avx512-bf16", Self::AVX2.and(Self::AVX512).and(Self::AVX512_VNNI).and(Self::AVX512_BF16)),
    ];

    /// The features of both sets.
    pub const fn and(self, other: CpuFeatures) -> CpuFeatures {
        CpuFeatures(self.0 | other.0)
    }

    /// Whether all of `other` are in this set.
    pub const fn contains(self, other: CpuFeatures) -> bool {
        self.0 & other.0 == other.0
    }

    /// The set of this name: `portable`, `avx2`, `avx512`, `avx512-vnni`, `avx512-bf16`.
    pub fn by_name(name: &str) -> Option<CpuFeatures> {
        Self::NAMED.iter().find(|(known, _)| *known == name).map(|(_, features)| *features)
    }

    /// The names that [`CpuFeatures::by_name`] knows, plainest first.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::NAMED.iter().map(|(name, _)| *name)
    }

    /// Everything this machine has.
    pub fn detect() -> CpuFeatures {
        static DETECTED: OnceLock<CpuFeatures> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            #[allow(unused_mut)]
            let mut found = CpuFeatures::PORTABLE;
            #[cfg(target_arch = "x86_64")]
            {
                use std::arch::is_x86_feature_detected as has;
                let mut add = |is_there: bool, features| found = if is_there { found.and(features) } else { found };
                add(has!("avx2") && has!("fma"), Self::AVX2);
                add(has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl"), Self::AVX512);
                add(has!("avx512bf16"), Self::AVX512_BF16);
                add(has!("avx512vnni"), Self::AVX512_VNNI);
            }
            found
        })
    }
}

impl fmt::Display for CpuFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, _)) = Self::NAMED.iter().find(|(_, features)| features == self) {
            return f.pad(name);
        }
        let single = [
            ("avx2", Self::AVX2),
            ("avx512f", Self::AVX512),
            ("avx512bf16", Self::AVX512_BF16),
            ("avx512vnni", Self::AVX512_VNNI),
        ];
        let names: Vec<&str> = single.iter().filter(|(_, one)| self.contains(*one)).map(|(name, _)| *name).collect();
        f.pad(&names.join("+"))
    }
}

impl fmt::Debug for CpuFeatures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuFeatures({self})")
    }
}

impl Serialize for CpuFeatures {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CpuFeatures {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<CpuFeatures, D::Error> {
        let name = String::deserialize(deserializer)?;
        CpuFeatures::by_name(&name).ok_or_else(|| {
            let known: Vec<&str> = CpuFeatures::names().collect();
            serde::de::Error::custom(format!("`{}` is not a CPU, expected one of {}", clip(name), known.join(", ")))
        })
    }
}

/// A named set of features that this machine has. One is only made after its features were detected, which is what makes
/// the calls that [`dispatch!`] generates sound.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(CpuFeatures);

impl Isa {
    /// The best set this machine has.
    pub fn detect() -> Isa {
        let here = CpuFeatures::detect();
        let best = CpuFeatures::NAMED.iter().rev().find(|(_, set)| here.contains(*set));
        Isa(best.map_or(CpuFeatures::PORTABLE, |(_, set)| *set))
    }

    /// The set that the environment variable [`CPU_VARIABLE`] names, or the best one if it is unset or empty.
    ///
    /// # Errors
    /// [`Error::Request`] if it names a set that this machine lacks or that does not exist.
    pub fn from_environment() -> Result<Isa> {
        match std::env::var(CPU_VARIABLE) {
            Ok(name) if !name.is_empty() => Isa::by_name(&name).ok_or_else(|| {
                let sets: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
                Error::Request(format!(
                    "{CPU_VARIABLE} is `{}`, which this machine lacks; it has: {}",
                    clip(name),
                    sets.join(", ")
                ))
            }),
            _ => Ok(Isa::detect()),
        }
    }

    /// Every named set this machine has, plainest first.
    pub fn available() -> Vec<Isa> {
        let here = CpuFeatures::detect();
        CpuFeatures::NAMED.iter().filter(|(_, set)| here.contains(*set)).map(|(_, set)| Isa(*set)).collect()
    }

    /// The set of this name among those this machine has.
    pub fn by_name(name: &str) -> Option<Isa> {
        Isa::available().into_iter().find(|isa| isa.to_string() == name)
    }

    /// The features in this set.
    pub fn features(self) -> CpuFeatures {
        self.0
    }

    /// Whether all of `features` are in this set.
    pub fn has(self, features: CpuFeatures) -> bool {
        self.0.contains(features)
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Isa({self})")
    }
}

/// Defines `fn $name[G: Bound](isa, args…)`, which runs the first of the listed bodies whose features `isa` has, compiled
/// for them:
///
/// ```ignore
/// dispatch! {
///     /// One row.
///     pub fn add_row[O: Element](x: &[f32], out: &mut [O]) {
///         avx512 => add_row_body::<O, true>,
///         avx2 => add_row_body::<O, true>,
///         portable => add_row_body::<O, false>,
///     }
/// }
/// ```
///
/// Sets are `avx512_bf16`, `avx512_vnni`, `avx512`, `avx2` and, last and always, `portable`. A body is a function marked
/// `#[inline(always)]`, so that it is compiled with the features of where it is called; the compiler vectorizes it, or
/// it uses intrinsics of that set.
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $generics:tt $args:tt $(-> $out:ty)? { $($arms:tt)+ }) => {
        $crate::isa::dispatch!(
            @define [$(#[$meta])* $vis] $name $generics $args ($($out)?) $generics $args ($($out)?) { $($arms)+ }
        );
    };
    // Generics, arguments and result come twice: to be taken apart here, and whole to be handed to each arm.
    (@define [$($head:tt)*] $name:ident [$($g:ident: $bound:path),*] ($($arg:ident: $ty:ty),* $(,)?) ($($out:ty)?)
     $generics:tt $args:tt $result:tt $arms:tt) => {
        #[allow(clippy::too_many_arguments)]
        $($head)* fn $name<$($g: $bound),*>(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $out)? {
            let _ = isa;
            $crate::isa::dispatch! { @arms isa $generics $args $result $arms }
        }
    };
    (@arms $isa:ident $generics:tt $args:tt $result:tt { $($set:ident => $body:expr),+ $(,)? }) => {{
        $($crate::isa::dispatch! { @$set $isa $generics $args $result $body })+
    }};
    (@avx512_bf16 $($rest:tt)*) => {
        $crate::isa::dispatch! { @call [AVX2, AVX512, AVX512_BF16]
            "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma", $($rest)* }
    };
    (@avx512_vnni $($rest:tt)*) => {
        $crate::isa::dispatch! { @call [AVX2, AVX512, AVX512_VNNI]
            "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma", $($rest)* }
    };
    (@avx512 $($rest:tt)*) => {
        $crate::isa::dispatch! { @call [AVX2, AVX512] "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", $($rest)* }
    };
    (@avx2 $($rest:tt)*) => {
        $crate::isa::dispatch! { @call [AVX2] "avx2,fma", $($rest)* }
    };
    (@portable $isa:ident $generics:tt ($($arg:ident: $ty:ty),* $(,)?) $result:tt $body:expr) => {
        return ($body)($($arg),*)
    };
    (@call [$($feature:ident),+] $enabled:tt, $isa:ident [$($g:ident: $bound:path),*] ($($arg:ident: $ty:ty),* $(,)?)
     ($($out:ty)?) $body:expr) => {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = $enabled)]
            #[allow(clippy::too_many_arguments)]
            fn compiled<$($g: $bound),*>($($arg: $ty),*) $(-> $out)? {
                ($body)($($arg),*)
            }
            if $($isa.has($crate::isa::CpuFeatures::$feature))&&+ {
                // SAFETY: an `Isa` is only made after its features were detected.
                #[allow(unsafe_code)]
                return unsafe { compiled($($arg),*) };
            }
        }
    };
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_the_best_is_last() {
        let sets = Isa::available();
        assert_eq!(sets.last(), Some(&Isa::detect()));
        for isa in sets {
            assert_eq!(Isa::by_name(&isa.to_string()), Some(isa));
        }
        assert_eq!(Isa::by_name("amx"), None);
        for name in CpuFeatures::names() {
            let features = CpuFeatures::by_name(name).unwrap();
            assert_eq!(features.to_string(), name);
            let json = serde_json::to_string(&features).unwrap();
            assert_eq!(serde_json::from_str::<CpuFeatures>(&json).unwrap(), features);
        }
        assert!(serde_json::from_str::<CpuFeatures>("\"amx\"").unwrap_err().to_string().contains("portable, avx2"));
    }

    #[test]
    fn sets_are_sets_not_an_order() {
        let vnni = CpuFeatures::AVX2.and(CpuFeatures::AVX512).and(CpuFeatures::AVX512_VNNI);
        let bf16 = CpuFeatures::AVX2.and(CpuFeatures::AVX512).and(CpuFeatures::AVX512_BF16);
        assert!(!vnni.contains(bf16) && !bf16.contains(vnni));
        assert_eq!(bf16.to_string(), "avx2+avx512f+avx512bf16");
    }

    #[test]
    fn a_body_is_chosen_by_the_features_it_needs() {
        dispatch! {
            /// The features of the body that ran.
            fn chosen[]() -> CpuFeatures {
                avx512_vnni => || CpuFeatures::AVX512_VNNI,
                avx2 => || CpuFeatures::AVX2,
                portable => || CpuFeatures::PORTABLE,
            }
        }
        for isa in Isa::available() {
            let expected = [CpuFeatures::AVX512_VNNI, CpuFeatures::AVX2].into_iter().find(|f| isa.has(*f));
            assert_eq!(chosen(isa), expected.unwrap_or(CpuFeatures::PORTABLE), "{isa}");
        }
    }
}
