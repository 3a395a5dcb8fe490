// Evaluation of a network layer by layer, as TensorRT's headers describe the layers: with FAKE_COMPUTES set, a plan
// computes the network that it was built from, in the process that built it. Elements of every type are FP32, which
// represents them exactly (integers are below 2^24). Included by builder.inl.

namespace evaluate {

struct Value {
    std::vector<std::int64_t> dims;
    std::vector<float> of;
};

// Values by tensor.
using Values = std::map<ITensor const*, Value>;
// A layer.
using Step = std::function<void(Values&)>;

std::int64_t count(std::vector<std::int64_t> const& dims)
{
    return std::accumulate(dims.begin(), dims.end(), std::int64_t{1}, std::multiplies<>());
}

float of_f8(std::uint8_t bits)
{
    int const exponent = bits >> 3 & 15;
    int const mantissa = bits & 7;
    float const size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                     : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    return bits >> 7 != 0 ? -size : size;
}

// To nearest, ties to even; saturates.
float rounded_f8(float value)
{
    if (std::isnan(value)) {
        return value;
    }
    float const size = std::min(std::fabs(value), 448.0F);
    int exponent = 0;
    std::frexp(size, &exponent);
    float const unit = std::ldexp(1.0F, std::max(exponent - 4, -9));
    return std::copysign(std::min(std::nearbyint(size / unit) * unit, 448.0F), value);
}

float element(DataType type, void const* data, std::int64_t i)
{
    switch (type) {
    case DataType::kBF16: return model::of_bf16(static_cast<std::uint16_t const*>(data)[i]);
    case DataType::kINT32: return static_cast<float>(static_cast<std::int32_t const*>(data)[i]);
    case DataType::kINT64: return static_cast<float>(static_cast<std::int64_t const*>(data)[i]);
    case DataType::kBOOL: return static_cast<std::uint8_t const*>(data)[i] != 0 ? 1.0F : 0.0F;
    case DataType::kINT8: return static_cast<std::int8_t const*>(data)[i];
    case DataType::kFP8: return of_f8(static_cast<std::uint8_t const*>(data)[i]);
    default: return static_cast<float const*>(data)[i];
    }
}

void store(DataType type, void* data, std::int64_t i, float value)
{
    switch (type) {
    case DataType::kBF16: static_cast<std::uint16_t*>(data)[i] = model::to_bf16(value); break;
    case DataType::kINT32: static_cast<std::int32_t*>(data)[i] = static_cast<std::int32_t>(value); break;
    default: static_cast<float*>(data)[i] = value; break;
    }
}

Value read(DataType type, std::vector<std::int64_t> dims, void const* data)
{
    Value value{std::move(dims), {}};
    auto const elements = count(value.dims);
    value.of.reserve(static_cast<std::size_t>(elements));
    for (std::int64_t i = 0; i < elements; ++i) {
        value.of.push_back(element(type, data, i));
    }
    return value;
}

// A strided view, as an array.
Value view(Value const& x, std::vector<std::int64_t> dims, std::vector<std::int64_t> const& strides, std::int64_t first)
{
    Value out{std::move(dims), {}};
    auto const elements = count(out.dims);
    for (std::int64_t i = 0; i < elements; ++i) {
        std::int64_t at = first;
        std::int64_t rest = i;
        for (std::size_t d = out.dims.size(); d-- > 0;) {
            at += rest % out.dims[d] * strides[d];
            rest /= out.dims[d];
        }
        out.of.push_back(x.of[static_cast<std::size_t>(at)]);
    }
    return out;
}

std::vector<std::int64_t> strides_of(std::vector<std::int64_t> const& dims)
{
    std::vector<std::int64_t> strides(dims.size(), 1);
    for (std::size_t d = dims.size(); d-- > 1;) {
        strides[d - 1] = strides[d] * dims[d];
    }
    return strides;
}

std::vector<std::int64_t> sizes(Value const& x) { return {x.of.begin(), x.of.end()}; }

Value elementwise(Value const& x, Value const& y, bool product)
{
    auto dims = x.dims;
    for (std::size_t d = 0; d < dims.size(); ++d) {
        dims[d] = std::max(x.dims[d], y.dims[d]);
    }
    auto const repeated = [&](Value const& of) {
        auto strides = strides_of(of.dims);
        for (std::size_t d = 0; d < dims.size(); ++d) {
            strides[d] = of.dims[d] == 1 ? 0 : strides[d];
        }
        return view(of, dims, strides, 0);
    };
    auto out = repeated(x);
    auto const other = repeated(y);
    for (std::size_t i = 0; i < out.of.size(); ++i) {
        out.of[i] = product ? out.of[i] * other.of[i] : out.of[i] + other.of[i];
    }
    return out;
}

Value transposed(Value const& x, std::int32_t const* order)
{
    auto const from = strides_of(x.dims);
    std::vector<std::int64_t> dims;
    std::vector<std::int64_t> strides;
    for (std::size_t d = 0; d < x.dims.size(); ++d) {
        dims.push_back(x.dims[static_cast<std::size_t>(order[d])]);
        strides.push_back(from[static_cast<std::size_t>(order[d])]);
    }
    return view(x, dims, strides, 0);
}

Value reshaped(Value x, std::vector<std::int64_t> dims)
{
    std::int64_t known = 1;
    for (auto n : dims) {
        known *= n > 0 ? n : 1;
    }
    std::replace(dims.begin(), dims.end(), std::int64_t{-1}, static_cast<std::int64_t>(x.of.size()) / known);
    x.dims = std::move(dims);
    return x;
}

Value sliced(Value const& x, Dims const& start, std::vector<std::int64_t> size)
{
    auto const strides = strides_of(x.dims);
    std::int64_t first = 0;
    for (std::int32_t d = 0; d < start.nbDims; ++d) {
        first += start.d[d] * strides[static_cast<std::size_t>(d)];
    }
    return view(x, std::move(size), strides, first);
}

Value gathered(Value const& table, Value const& indices)
{
    auto dims = indices.dims;
    dims.insert(dims.end(), table.dims.begin() + 1, table.dims.end());
    auto const width = count({table.dims.begin() + 1, table.dims.end()});
    Value out{dims, {}};
    for (float index : indices.of) {
        auto const* row = &table.of[static_cast<std::size_t>(index) * static_cast<std::size_t>(width)];
        out.of.insert(out.of.end(), row, row + width);
    }
    return out;
}

Value multiplied(Value const& x, Value const& weight, bool transpose)
{
    auto const rows = x.dims[0];
    auto const in = x.dims[1];
    auto const out_width = weight.dims[transpose ? 0 : 1];
    auto const [across, along] = transpose ? std::pair{in, std::int64_t{1}} : std::pair{std::int64_t{1}, out_width};
    Value out{{rows, out_width}, {}};
    for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t o = 0; o < out_width; ++o) {
            float sum = 0;
            for (std::int64_t i = 0; i < in; ++i) {
                sum += x.of[static_cast<std::size_t>(row * in + i)]
                    * weight.of[static_cast<std::size_t>(o * across + i * along)];
            }
            out.of.push_back(sum);
        }
    }
    return out;
}

Value dequantized(Value const& x, Value const& scale, std::int32_t axis)
{
    Value out = x;
    auto const stride = scale.of.size() == 1 ? 1 : strides_of(x.dims)[static_cast<std::size_t>(axis)];
    for (std::size_t i = 0; i < out.of.size(); ++i) {
        auto const channel = scale.of.size() == 1 ? 0 : static_cast<std::int64_t>(i) / stride % x.dims[static_cast<std::size_t>(axis)];
        out.of[i] *= scale.of[static_cast<std::size_t>(channel)];
    }
    return out;
}

Value normalized(Value const& x, Value const& scale, Value const& bias, float epsilon)
{
    Value out = x;
    auto const width = static_cast<std::size_t>(x.dims.back());
    for (std::size_t first = 0; first < out.of.size(); first += width) {
        double mean = 0;
        double square = 0;
        for (std::size_t i = 0; i < width; ++i) {
            mean += x.of[first + i] / static_cast<double>(width);
        }
        for (std::size_t i = 0; i < width; ++i) {
            square += (x.of[first + i] - mean) * (x.of[first + i] - mean) / static_cast<double>(width);
        }
        auto const by = 1 / std::sqrt(square + static_cast<double>(epsilon));
        for (std::size_t i = 0; i < width; ++i) {
            out.of[first + i] = static_cast<float>((x.of[first + i] - mean) * by) * scale.of[i] + bias.of[i];
        }
    }
    return out;
}

// x [B, heads, T, d], cos and sin [B, T, half]; dimension j is paired with j + half.
Value rotated(Value const& x, Value const& cos, Value const& sin)
{
    Value out = x;
    auto const T = x.dims[2];
    auto const d = x.dims[3];
    auto const half = cos.dims[2];
    for (std::int64_t row = 0; row < count(x.dims) / d; ++row) {
        auto const angle = (row / (x.dims[1] * T) * T + row % T) * half;
        for (std::int64_t j = 0; j < half; ++j) {
            auto const at = static_cast<std::size_t>(row * d + j);
            auto const pair = at + static_cast<std::size_t>(half);
            auto const c = cos.of[static_cast<std::size_t>(angle + j)];
            auto const s = sin.of[static_cast<std::size_t>(angle + j)];
            out.of[at] = x.of[at] * c - x.of[pair] * s;
            out.of[pair] = x.of[pair] * c + x.of[at] * s;
        }
    }
    return out;
}

Value updated(Value cache, Value const& update, Value const& indices)
{
    auto const rows = update.dims[2] * update.dims[3];
    auto const capacity = cache.dims[2] * cache.dims[3];
    for (std::int64_t head = 0; head < update.dims[0] * update.dims[1]; ++head) {
        auto const position = static_cast<std::int64_t>(indices.of[static_cast<std::size_t>(head / update.dims[1])]);
        std::copy_n(update.of.begin() + head * rows, rows,
            cache.of.begin() + head * capacity + position * update.dims[3]);
    }
    return cache;
}

// Unscaled; the mask is null for a causal one that is aligned to the lower right.
Value attended(Value const& q, Value const& keys, Value const& values, Value const* mask)
{
    auto const [B, H, T, d] = std::array<std::int64_t, 4>{q.dims[0], q.dims[1], q.dims[2], q.dims[3]};
    auto const S = keys.dims[2];
    Value out{q.dims, std::vector<float>(q.of.size())};
    std::vector<float> p(static_cast<std::size_t>(S));
    for (std::int64_t row = 0; row < B * H * T; ++row) {
        auto const t = row % T;
        auto const b = row / (H * T);
        auto const head = (b * keys.dims[1] + row / T % H * keys.dims[1] / H) * S * d;
        auto const sees = [&](std::int64_t s) {
            return mask != nullptr ? mask->of[static_cast<std::size_t>((b * T + t) * S + s)] != 0 : s <= t + S - T;
        };
        float most = -std::numeric_limits<float>::infinity();
        for (std::int64_t s = 0; s < S; ++s) {
            float sum = 0;
            for (std::int64_t i = 0; i < d; ++i) {
                sum += q.of[static_cast<std::size_t>(row * d + i)] * keys.of[static_cast<std::size_t>(head + s * d + i)];
            }
            p[static_cast<std::size_t>(s)] = sum;
            most = sees(s) ? std::max(most, sum) : most;
        }
        float total = 0;
        for (std::int64_t s = 0; s < S; ++s) {
            auto& weight = p[static_cast<std::size_t>(s)];
            weight = sees(s) ? std::exp(weight - most) : 0;
            total += weight;
        }
        for (std::int64_t i = 0; i < d; ++i) {
            float sum = 0;
            for (std::int64_t s = 0; s < S; ++s) {
                sum += p[static_cast<std::size_t>(s)] * values.of[static_cast<std::size_t>(head + s * d + i)];
            }
            out.of[static_cast<std::size_t>(row * d + i)] = sum / total;
        }
    }
    return out;
}

// Sums along the last dimension, which is gone.
Value summed(Value const& x)
{
    auto const width = static_cast<std::size_t>(x.dims.back());
    Value out{{x.dims.begin(), x.dims.end() - 1}, {}};
    for (std::size_t first = 0; first < x.of.size(); first += width) {
        out.of.push_back(std::accumulate(x.of.begin() + first, x.of.begin() + first + width, 0.0F));
    }
    return out;
}

std::pair<Value, Value> largest(Value const& x, std::int64_t k)
{
    auto const width = x.dims[1];
    std::pair<Value, Value> out{{{x.dims[0], k}, {}}, {{x.dims[0], k}, {}}};
    for (std::int64_t row = 0; row < x.dims[0]; ++row) {
        std::vector<std::int64_t> order(static_cast<std::size_t>(width));
        std::iota(order.begin(), order.end(), 0);
        auto const key = [&](std::int64_t v) {
            auto const value = x.of[static_cast<std::size_t>(row * width + v)];
            return std::isnan(value) ? std::numeric_limits<float>::infinity() : value;
        };
        std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return key(a) > key(b); });
        for (std::int64_t i = 0; i < k; ++i) {
            auto const id = order[static_cast<std::size_t>(i)];
            out.first.of.push_back(x.of[static_cast<std::size_t>(row * width + id)]);
            out.second.of.push_back(static_cast<float>(id));
        }
    }
    return out;
}

} // namespace evaluate
