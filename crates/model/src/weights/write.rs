//! A safetensors file of f32 numbers, written piece by piece.

use std::collections::HashMap;
use std::ops::Range;

use bytes::Bytes;
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

/// Numbers in a piece: a mebibyte.
const PIECE: usize = 1 << 18;

/// The beginning of a safetensors file whose f32 tensors follow in the order given, each as its
/// numbers in little-endian bytes. No name comes twice.
///
/// # Errors
/// [`SafeTensorError`] for a size beyond counting.
pub fn f32_header(
    tensors: impl IntoIterator<Item = (String, Vec<usize>)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<Bytes, SafeTensorError> {
    let mut end = 0;
    let tensors = tensors.into_iter().map(|(name, shape)| {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        let info = TensorInfo {
            dtype: Dtype::F32,
            shape,
            data_offsets: (start, end),
        };
        (name, info)
    });
    let metadata = Metadata::new(metadata, tensors.collect())?;
    let mut json = serde_json::to_vec(&metadata)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let len = json.len() as u64;
    json.splice(..0, len.to_le_bytes());
    Ok(json.into())
}

/// Divides elements into ranges of at most a mebibyte.
pub fn f32_pieces(elements: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = elements.end;
    elements
        .step_by(PIECE)
        .map(move |start| start..end.min(start + PIECE))
}

/// Numbers as a safetensors file stores them.
pub fn f32_bytes(values: &[f32]) -> Bytes {
    let mut bytes = Vec::with_capacity(4 * values.len());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    #[test]
    fn header_and_pieces_are_a_file() {
        let long: Vec<f32> = (0..PIECE + 3).map(|i| i as f32).collect();
        let tensors: [(&str, &[f32]); 3] = [("a", &[1.0, -2.5]), ("empty", &[]), ("long", &long)];
        let shapes = tensors.map(|(name, values)| (name.to_owned(), vec![values.len()]));
        let mut file = f32_header(shapes, None).expect("a header").to_vec();
        for (_, values) in tensors {
            for piece in f32_pieces(0..values.len()) {
                assert!(piece.len() <= PIECE);
                file.extend_from_slice(&f32_bytes(&values[piece]));
            }
        }
        let file = SafeTensors::deserialize(&file).expect("a sound file");
        for (name, values) in tensors {
            assert_eq!(file.tensor(name).expect(name).data(), f32_bytes(values));
        }
    }
}
