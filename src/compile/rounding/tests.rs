use super::*;

/// Numbers close to normal, by a linear congruential generator.
fn random(seed: &mut u32) -> f32 {
    let mut uniform = || {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (*seed >> 8) as f32 / (1 << 24) as f32
    };
    (0..12).map(|_| uniform()).sum::<f32>() - 6.0
}

fn matrix(rows: usize, columns: usize, seed: u32) -> Vec<f32> {
    let mut seed = seed;
    (0..rows * columns).map(|_| random(&mut seed)).collect()
}

/// Inputs that share a few directions, as activations do, `[tokens, columns]`.
fn inputs(tokens: usize, columns: usize) -> Vec<f32> {
    let (directions, amounts, own) = (matrix(4, columns, 1), matrix(tokens, 4, 2), matrix(tokens, columns, 3));
    let value = |i: usize| {
        let (token, column) = (i / columns, i % columns);
        let shared: f32 = (0..4).map(|d| amounts[token * 4 + d] * directions[d * columns + column]).sum();
        shared + 0.3 * own[i]
    };
    (0..tokens * columns).map(value).collect()
}

fn products(columns: usize) -> InputProducts {
    let mut products = InputProducts::new(columns);
    inputs(600, columns).chunks(70 * columns).for_each(|some| products.add(some));
    products
}

fn errors(scheme: Scheme, weights: &[f32], codes: &[f32], scales: &[f32], columns: usize) -> Vec<f32> {
    let (group, blocks) = (scheme.block().unwrap_or(columns), scheme.blocks(columns));
    let restored = |i: usize| codes[i] * scales[i / columns * blocks + i % columns / group];
    weights.iter().enumerate().map(|(i, weight)| weight - restored(i)).collect()
}

#[test]
fn products_are_sums_over_tokens() {
    for columns in [1, 7, 48, 100, 193] {
        let (mut products, x) = (products(columns), inputs(600, columns));
        products.add_pending();
        for i in 0..columns {
            for j in 0..=i {
                let sum: f64 = x.chunks(columns).map(|x| f64::from(x[i]) * f64::from(x[j])).sum();
                let found = products.runs[0].products[i * columns + j];
                let size: f64 = x.chunks(columns).map(|x| f64::from(x[i] * x[j]).abs()).sum();
                assert!((found - sum).abs() <= 1e-6 * size, "{columns} columns, {i} and {j}: {found}, not {sum}");
            }
        }
        let e = matrix(3, columns, 9);
        let of_outputs: f64 = x
            .chunks(columns)
            .flat_map(|x| {
                e.chunks(columns).map(|e| x.iter().zip(e).map(|(x, e)| f64::from(x * e)).sum::<f64>().powi(2))
            })
            .sum();
        let found = products.output_error(&e);
        assert!((found - of_outputs).abs() < 1e-4 * of_outputs, "{columns} columns: {found}, not {of_outputs}");
    }
}

#[test]
fn factors_multiply_to_the_matrix() {
    for n in [1, 5, 64, 65, 150] {
        let a = matrix(n, 2 * n, 4);
        let product = |i: usize, j: usize| -> f64 {
            (0..2 * n).map(|p| f64::from(a[i * 2 * n + p]) * f64::from(a[j * 2 * n + p])).sum()
        };
        let whole: Vec<f64> = (0..n * n).map(|at| product(at / n, at % n)).collect();
        let mut lower = whole.clone();
        assert!(factorize(&mut lower, n));
        for i in 0..n {
            for j in 0..=i {
                let back: f64 = (0..=j).map(|p| lower[i * n + p] * lower[j * n + p]).sum();
                assert!((back - whole[i * n + j]).abs() < 1e-9 * whole[i * n + i].max(1.0), "{n}: {i}, {j}");
            }
        }
        let mut indefinite = whole;
        indefinite[n * n - 1] = -1.0;
        assert!(!factorize(&mut indefinite, n));
    }
}

/// The definition, one column after the other in double precision.
fn rounded_by_the_formula(scheme: Scheme, products: &InputProducts, weights: &[f32], columns: usize) -> Vec<f32> {
    let n = columns;
    let of = |i: usize, j: usize| products.runs[0].products[i.max(j) * n + i.min(j)];
    let mean = (0..n).map(|i| of(i, i)).sum::<f64>() / n as f64;
    let h = |i: usize, j: usize| of(i, j) + if i == j { DAMPING * mean } else { 0.0 };
    // H = R Rᵀ with an upper R, from the last column on.
    let mut r = vec![0f64; n * n];
    for i in (0..n).rev() {
        for j in (0..=i).rev() {
            let sum: f64 = (i + 1..n).map(|p| r[j * n + p] * r[i * n + p]).sum();
            r[j * n + i] = if i == j { (h(i, i) - sum).sqrt() } else { (h(j, i) - sum) / r[i * n + i] };
        }
    }
    let mut codes = Vec::new();
    for row in weights.chunks(n) {
        let (mut errors, mut scale) = (vec![0f64; n], [0f32]);
        scheme.scales(row, &mut scale);
        for i in 0..n {
            let owed: f64 = (0..i).map(|j| errors[j] * r[j * n + i] / r[i * n + i]).sum();
            let code = scheme.nearest((f64::from(row[i]) + owed) as f32, scale[0]);
            errors[i] = f64::from(row[i]) - f64::from(code) * f64::from(scale[0]);
            codes.push(code);
        }
    }
    codes
}

#[test]
fn codes_are_those_of_the_formula() {
    // Per-channel scales depend on the weights alone. FP32 sums may turn a tie the other way, which changes later codes.
    for columns in [40, 200] {
        let mut products = products(columns);
        products.add_pending();
        let weights = matrix(20, columns, 5);
        for scheme in [Scheme::INT8, Scheme::FP8] {
            let expected = rounded_by_the_formula(scheme, &products, &weights, columns);
            let mut again = InputProducts::new(columns);
            inputs(600, columns).chunks(70 * columns).for_each(|some| again.add(some));
            let codes = again.factorize().unwrap().round(scheme, &weights).codes;
            let differing = codes.iter().zip(&expected).filter(|(a, b)| a != b).count();
            assert!(differing * 50 <= codes.len(), "{scheme}, {columns} columns: {differing} of {}", codes.len());
        }
    }
}

#[test]
fn outputs_are_closer_than_with_the_nearest_codes() {
    for (columns, scheme) in [(192, Scheme::INT4), (300, Scheme::INT4), (192, Scheme::FP8), (24, Scheme::INT4)] {
        let weights = matrix(50, columns, 6);
        let (mut nearest, mut scales) = (weights.clone(), vec![0f32; 50 * scheme.blocks(columns)]);
        scheme.quantize(columns, &mut nearest, &mut scales);
        let mut products = products(columns);
        let error_of_nearest = products.output_error(&errors(scheme, &weights, &nearest, &scales, columns));
        let rounded = self::products(columns).factorize().unwrap().round(scheme, &weights);
        let error = products.output_error(&errors(scheme, &weights, &rounded.codes, &rounded.scales, columns));
        assert!(error < 0.6 * error_of_nearest, "{scheme}, {columns} columns: {error:e}, {error_of_nearest:e}");
    }
}

#[test]
fn threads_change_nothing() {
    let (columns, weights) = (300, matrix(50, 300, 7));
    let rounded = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| products(columns).factorize().unwrap().round(Scheme::INT4, &weights))
    };
    let (one, three) = (rounded(1), rounded(3));
    assert!(one.codes == three.codes && one.scales == three.scales);
}

#[test]
fn inputs_that_are_absent_or_not_finite_are_survived() {
    let weights = matrix(4, 60, 8);
    let none = InputProducts::new(60).factorize().unwrap().round(Scheme::INT4, &weights);
    let (mut nearest, mut scales) = (weights.clone(), vec![0f32; 4]);
    Scheme::INT4.quantize(60, &mut nearest, &mut scales);
    assert!(none.codes == nearest && none.scales == scales, "nothing to compensate by");
    let mut one_column = InputProducts::new(60);
    let mut x = vec![0f32; 60];
    x[3] = 1.0;
    one_column.add(&x);
    assert!(one_column.factorize().is_some());
    let mut infinite = InputProducts::new(60);
    x[5] = f32::NAN;
    infinite.add(&x);
    assert!(infinite.factorize().is_none());
}
