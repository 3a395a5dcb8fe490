use std::slice;

use super::*;
use crate::backend::constants::ConstRows;
use crate::backend::tensorrt::lower::WeightLayout;
use crate::engine::tensorrt::StepSize;
use crate::graph::{Const, Dim, Type};

const B: Extent = Extent::Step(StepSize::B);

fn bound(name: &str, role: BindingRole, dtype: DType, shape: &[Extent]) -> Binding {
    Binding { name: name.into(), role, dtype, shape: shape.to_vec() }
}

fn weight(name: &str, dtype: DType, shape: &[usize]) -> PlanWeight {
    let ty = Type::new(dtype, shape.iter().map(|size| Dim::fixed(*size)));
    let content = ConstRows::new(&Const::Tensor(name.into()), &ty).unwrap();
    let shape = shape.to_vec();
    PlanWeight { name: name.into(), dtype, shape, content, layout: WeightLayout::Rows, in_plan: false }
}

fn weights() -> Vec<PlanWeight> {
    let up = |layer: usize| weight(&format!("model.layers.{layer}.mlp.up_proj.weight.i8"), DType::I8, &[64, 256]);
    let gamma = |layer: usize| weight(&format!("layers.{layer}.mlp.norm.gamma"), DType::F32, &[64]);
    let embedding = weight("embed.bf16", DType::BF16, &[1000, 64]);
    let table = weight("rotary.cos.table", DType::F32, &[512, 8]);
    let head = weight("head.bf16", DType::BF16, &[1000, 64]);
    let codes = PlanWeight { in_plan: true, ..weight("layers.0.codes", DType::I4, &[64, 64]) };
    vec![embedding, table, gamma(0), up(0), gamma(1), up(1), weight("norm.gamma", DType::F32, &[64]), head, codes]
}

/// Two layers, two heads of 16, a cache of 512 tokens.
fn bindings() -> Vec<Binding> {
    let fixed = |shape: &[usize]| shape.iter().map(|n| Extent::Fixed(*n)).collect::<Vec<Extent>>();
    let inputs = weights().into_iter().filter(|weight| !weight.in_plan);
    let mut bindings: Vec<Binding> =
        inputs.map(|weight| bound(&weight.name, BindingRole::Weight, weight.dtype, &fixed(&weight.shape))).collect();
    let cache = [B, Extent::Fixed(2), Extent::Fixed(512), Extent::Fixed(16)];
    for layer in 0..2 {
        for (name, role) in [
            ("key_cache", BindingRole::KeyCache(layer)),
            ("value_cache", BindingRole::ValueCache(layer)),
            ("keys", BindingRole::UpdatedKeys(layer)),
            ("values", BindingRole::UpdatedValues(layer)),
        ] {
            bindings.push(bound(&format!("layers.{layer}.attention.{name}"), role, DType::BF16, &cache));
        }
    }
    bindings.push(bound("total_tokens", BindingRole::TotalTokens, DType::I32, &[B]));
    bindings.push(bound("logits_rows", BindingRole::LogitsRows, DType::I32, &[B]));
    bindings
}

fn tensor(name: &str, dtype: &str, dims: &[i64]) -> KernelTensor {
    KernelTensor { name: name.into(), dims: dims.to_vec(), dtype: dtype.into() }
}

fn kernel(name: &str, kind: KernelKind, inputs: &[KernelTensor], outputs: &[KernelTensor]) -> GpuKernel {
    let (inputs, outputs) = (inputs.to_vec(), outputs.to_vec());
    GpuKernel { name: name.into(), kind, layer_type: "kgen".into(), inputs, constants: Vec::new(), outputs }
}

fn row() -> KernelTensor {
    tensor("__row", "bf16", &[-1, 64])
}

fn up(layer: usize) -> KernelTensor {
    tensor(&format!("model.layers.{layer}.mlp.up_proj.weight.i8"), "i8", &[64, 256])
}

fn step() -> Vec<GpuKernel> {
    use KernelKind::{Attention, Fused, Gemm, Host};
    let keys = |layer: usize| tensor(&format!("layers.{layer}.attention.keys"), "bf16", &[-1, 2, 512, 16]);
    let gamma = |name: &str| tensor(name, "f32", &[64]);
    vec![
        kernel("shapes", Host, &[], &[]),
        kernel("__myl_GathCast", Fused, &[tensor("embed.bf16", "bf16", &[1000, 64])], &[row()]),
        kernel("__myl_MeanDiv", Fused, &[gamma("layers.0.mlp.norm.gamma"), row()], &[row()]),
        kernel("_mha", Attention, &[keys(0), tensor("total_tokens", "i32", &[-1])], &[row()]),
        // The GEMM of one layer, fused with the norm of the next.
        kernel("__myl_FcMeanDiv", Gemm, &[up(0), gamma("layers.1.mlp.norm.gamma")], &[row()]),
        kernel("_mha", Attention, &[keys(1), row()], &[row()]),
        kernel("__myl_Fc", Gemm, &[up(1)], &[row()]),
        kernel("__myl_CastAddGath", Fused, &[row(), tensor("logits_rows", "i32", &[-1])], &[row()]),
        kernel("__myl_MeanDiv", Fused, &[gamma("norm.gamma"), row()], &[row()]),
        kernel("gemm", Gemm, &[tensor("head.bf16", "bf16", &[64, 1000])], &[row()]),
    ]
}

#[test]
fn kernels_are_in_the_layers_whose_tensors_they_touch() {
    let analysis = StepKernels::of(&step(), &bindings());
    let (before, after) = (KernelLocation::Before, KernelLocation::After);
    let (first, second) = (KernelLocation::Layer(0), KernelLocation::Layer(1));
    assert_eq!(analysis.places, [before, before, first, first, first, second, second, after, after, after]);
    assert_eq!((analysis.launches, &analysis.by_layer[..]), (9, &[3, 2][..]));
    assert_eq!(analysis.layer_launches(), Some((2, 3)));
    assert_eq!(analysis.layer(1, &step()).count(), 2);
    assert_eq!((analysis.weight_copies, analysis.cache_copies), (vec![], vec![]));
    assert_eq!(StepKernels::of(&step(), &[]).layer_launches(), None);
}

#[test]
fn a_matrix_that_no_product_reads_is_copied() {
    let copies = |kernel: GpuKernel| StepKernels::of(&[kernel], &bindings()).weight_copies;
    let fused = |name: &str, inputs: &[KernelTensor], outputs: &[KernelTensor]| {
        copies(kernel(name, KernelKind::Fused, inputs, outputs))
    };
    let transposed = tensor("__copy", "bf16", &[256, 64]);
    let of_up = Copied { kernel: 0, of: Some(up(0).name), what: "bf16[256,64]".into() };
    assert_eq!(fused("__myl_CastMulTran", &[up(0)], std::slice::from_ref(&transposed)), [of_up]);
    assert_eq!(fused("__myl_Sum", &[up(0)], &[row()])[0].what, "i8[64,256]");
    // A row lookup is not a copy, unless it writes as much as the whole matrix.
    assert_eq!(fused("__myl_GathCast", &[up(0)], &[row()]), []);
    assert_eq!(fused("__myl_CastReshEtc", &[up(0)], &[row()]), []);
    assert_eq!(fused("__myl_GathCast", &[up(0)], &[transposed]).len(), 1);
    assert_eq!(fused("__myl_MulAdd", &[tensor("layers.0.mlp.norm.gamma", "f32", &[64])], &[row()]), []);
    // Embedded codes have names that TensorRT made up.
    let unpacked = kernel("__myl_CastMul", KernelKind::Fused, &[], &[tensor("__copy", "bf16", &[64, 64])]);
    let constants = vec![tensor("__const", "f32", &[64, 64]), tensor("__codes", "i4", &[64, 64])];
    let [copy] = &copies(GpuKernel { constants: constants.clone(), ..unpacked })[..] else { panic!("one copy") };
    assert_eq!((copy.of.as_deref(), copy.what.as_str()), (Some("__codes"), "bf16[64,64]"));
    let product = kernel("__myl_CastMulFc", KernelKind::Gemm, &[], &[row()]);
    assert_eq!(copies(GpuKernel { constants, ..product }), []);
}

#[test]
fn what_is_as_large_as_a_cache_is_a_copy_of_it() {
    let copies = |name: &str, dims: &[i64]| {
        let keys = tensor("layers.0.attention.keys", "bf16", &[-1, 2, 512, 16]);
        let kernel = kernel("__myl_Tran", KernelKind::Fused, &[keys], &[tensor(name, "bf16", dims)]);
        StepKernels::of(&[kernel], &bindings()).cache_copies
    };
    let of = Some("layers.0.attention.keys".into());
    assert_eq!(copies("__x", &[-1, 16, 512]), [Copied { kernel: 0, of, what: "bf16[-1,16,512]".into() }]);
    for dims in [&[2, 512, 16][..], &[-1, 2, 512, 16], &[-1, 1, 512, 2, 16], &[2 * 512 * 16], &[-1, 1024, 16]] {
        assert_eq!(copies("__x", dims).len(), 1, "{dims:?}");
    }
    for dims in [&[-1, 512][..], &[-1, 1, -1, 512], &[512, 8], &[-1, 2, -1, 16], &[], &[i64::MAX, i64::MAX]] {
        assert_eq!(copies("__x", dims), [], "{dims:?}");
    }
    assert_eq!(copies("layers.0.attention.keys", &[-1, 2, 512, 16]), []);
}

#[test]
fn traffic_is_weights_once_and_the_rest_for_each_sequence() {
    let traffic = Traffic::of(&step(), &bindings(), &weights());
    // No kernel reads the rotary table here, so nothing tells that it is only looked up.
    let whole = 512 * 8 * 4 + 3 * 64 * 4 + 2 * 64 * 256 + 1000 * 64 * 2 + 64 * 64 / 2;
    assert_eq!(traffic, Traffic { weight_bytes: whole, row_bytes: 128, kv_bytes_per_token: 2 * 2 * 2 * 16 * 2 });
    assert_eq!(traffic.decode_bytes(3, 100), whole + 3 * (128 + 100 * 256));
    assert_eq!(traffic.decode_bytes(usize::MAX, usize::MAX), u64::MAX);
    // A tied embedding is also the output head and read in full.
    let head = kernel("gemm", KernelKind::Gemm, &[tensor("embed.bf16", "bf16", &[64, 1000])], &[row()]);
    let tied = Traffic::of(&[step(), vec![head]].concat(), &bindings(), &weights());
    assert_eq!(tied.weight_bytes, whole + 1000 * 64 * 2);
    assert!((GPUS[0].seconds(1_555_000_000) - 1e-3).abs() < 1e-9);
}

/// Kernels as TensorRT for RTX 1.7 lists them for SM 8.9, of weights as constants and as inputs.
#[test]
fn products_in_fp8_are_told_from_wider_ones() {
    let x = tensor("x", "f8", &[-1, 64]);
    let constant = tensor("__mye168_dconst", "f8", &[64, 256]);
    let gemm = |layer_type: &str, name: &str, inputs: &[KernelTensor], constants: &[KernelTensor]| {
        let kernel = kernel(name, KernelKind::Gemm, inputs, &[tensor("y", "f32", &[-1, 256])]);
        GpuKernel { layer_type: layer_type.into(), constants: constants.to_vec(), ..kernel }
    };
    let name = "layers.1.mlp.up_proj.weight.f8";
    let codes = weight(name, DType::F8, &[64, 256]);
    let scales = weight("layers.1.mlp.up_proj.weight.scales", DType::F32, &[256]);
    let weights = [
        codes.clone(),
        scales,
        PlanWeight { in_plan: true, ..codes.clone() },
        codes,
        weight("b", DType::BF16, &[64, 64]),
    ];
    let input = tensor(name, "f8", &[64, 256]);
    let scale = tensor("s", "f32", &[256]);
    let kernels = [
        gemm("gemm", "layers.0.mlp.up/1.linear", slice::from_ref(&x), slice::from_ref(&constant)),
        gemm("runtime_fusion", "__myl_CastMulCastCastMulFc", &[x.clone(), scale, input], &[]),
        // Unpacked by a kernel before the GEMM.
        kernel("__myl_CastMulCastResh", KernelKind::Fused, &[], &[tensor("w", "bf16", &[64, 256])]),
        gemm("gemm", "other", &[tensor("z", "bf16", &[-1, 64])], &[]),
        // A cast after the product is none of its operands.
        gemm("kgen", "__myl_FcMulCast", &[x], &[tensor("c", "f8", &[64, 256])]),
    ];
    let mut kernels = kernels.to_vec();
    kernels[2].constants.push(constant);
    let found = Fp8Products::of(&kernels, &weights);
    assert_eq!((found.layers, found.in_fp8), (3, 1));
    assert_eq!(found.widened, [name, "__myl_CastMulCastResh"]);
    assert_eq!(found.untold(), 0);
    assert_eq!(Fp8Products::of(&kernels[4..], &weights).untold(), 3);
    assert_eq!(Fp8Products::of(&kernels, &[]).layers, 0);
}
