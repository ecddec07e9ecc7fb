//! A model's weight files: safetensors, memory-mapped or in memory, single or sharded.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

use crate::bridge::Real;
use crate::error::{Error, Result};
use crate::huge_pages;

mod write;

pub use write::{f32_bytes, f32_header, f32_pieces};

/// The file of an unsharded model.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The file that says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The longest header that is read; safetensors sets the same bound.
const MAX_HEADER: u64 = 100_000_000;

/// A model's tensors by name, read from where they lie when asked for.
///
/// Every header is checked when the files are opened: lengths, offsets, overlaps and names, so
/// that a hostile or truncated file is refused before anything is believed.
#[derive(Debug, Clone)]
pub struct Weights {
    shards: Vec<Shard>,
    by_name: BTreeMap<String, Place>,
    index: Option<Bytes>,
}

/// One weight file.
#[derive(Debug, Clone)]
pub struct Shard {
    /// The file's name, without a folder.
    pub name: String,
    /// The names of its tensors in the order of their bytes.
    pub tensors: Vec<String>,
    pub(crate) bytes: Bytes,
}

/// Where one tensor lies.
#[derive(Debug, Clone)]
struct Place {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// Which file holds which tensor.
#[derive(Debug, Deserialize)]
pub(crate) struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Maps the weight files of a model folder: those its index names, or `model.safetensors`.
    ///
    /// The files must not be changed while the weights are in use; a finished stage never is.
    ///
    /// # Errors
    /// [`Error::MissingFile`] if there are none, [`Error::Io`] if one cannot be opened,
    /// [`Error::Corrupt`] if one is not sound.
    pub fn from_dir(folder: &Path) -> Result<Self> {
        let index_path = folder.join(INDEX_FILE);
        if index_path.exists() {
            let index = std::fs::read(&index_path).map_err(|source| Error::Io {
                path: index_path,
                source,
            })?;
            let files = Index::parse(&index)?
                .files()
                .into_iter()
                .map(|name| Ok((name.clone(), map_file(&folder.join(name))?)))
                .collect::<Result<Vec<_>>>()?;
            return Self::open(files, Some(index.into()));
        }
        let single = folder.join(SINGLE_FILE);
        if !single.exists() {
            return Err(missing_weights(folder.display().to_string()));
        }
        Self::open(vec![(SINGLE_FILE.to_owned(), map_file(&single)?)], None)
    }

    /// Takes weight files that are already in memory, the index among them if there is one.
    ///
    /// # Errors
    /// As [`from_dir`](Self::from_dir).
    pub fn from_files(files: Vec<(String, Bytes)>) -> Result<Self> {
        let (index, mut shards): (Vec<_>, Vec<_>) =
            files.into_iter().partition(|(name, _)| name == INDEX_FILE);
        let Some((_, index)) = index.into_iter().next() else {
            shards.retain(|(name, _)| name == SINGLE_FILE);
            if shards.is_empty() {
                return Err(missing_weights("the list of files".to_owned()));
            }
            return Self::open(shards, None);
        };
        let wanted = Index::parse(&index)?.files();
        shards.retain(|(name, _)| wanted.contains(name));
        shards.sort_by(|a, b| a.0.cmp(&b.0));
        Self::open(shards, Some(index))
    }

    /// One file that is not a model's, such as an adapter's.
    pub(crate) fn from_one(name: &str, bytes: Bytes) -> Result<Self> {
        Self::open(vec![(name.to_owned(), bytes)], None)
    }

    fn open(files: Vec<(String, Bytes)>, index: Option<Bytes>) -> Result<Self> {
        let mut weights = Self {
            shards: Vec::new(),
            by_name: BTreeMap::new(),
            index,
        };
        for (name, bytes) in files {
            weights.add_shard(name, bytes)?;
        }
        if let Some(index) = &weights.index {
            weights.check_index(index)?;
        }
        Ok(weights)
    }

    fn add_shard(&mut self, file: String, bytes: Bytes) -> Result<()> {
        let header = read_header(&file, &bytes)?;
        let shard = self.shards.len();
        let data_start = bytes.len() - header.data_len();
        let mut tensors = Vec::new();
        for name in header.offset_keys() {
            let Some(info) = header.info(&name) else {
                continue;
            };
            let place = Place {
                shard,
                dtype: info.dtype,
                shape: info.shape.clone(),
                start: data_start + info.data_offsets.0,
                end: data_start + info.data_offsets.1,
            };
            if let Some(other) = self.by_name.insert(name.clone(), place) {
                let reason = format!("tensor {name} is also in {}", self.shards[other.shard].name);
                return Err(Error::Corrupt { file, reason });
            }
            tensors.push(name);
        }
        self.shards.push(Shard {
            name: file,
            tensors,
            bytes,
        });
        Ok(())
    }

    /// A tensor the index promises must be there, or a half-fetched model would load.
    fn check_index(&self, index: &[u8]) -> Result<()> {
        for name in Index::parse(index)?.tensors() {
            self.place(name)?;
        }
        Ok(())
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// Whether a tensor is there.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The files, in the order of their names.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The index file, if the weights are sharded.
    pub fn index(&self) -> Option<&[u8]> {
        self.index.as_deref()
    }

    /// A tensor's shape.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.place(name)?.shape)
    }

    /// A tensor's stored number type.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.place(name)?.dtype)
    }

    /// The number type that every matrix is stored in, if they all are in one: bf16 for most models.
    pub fn matrix_dtype(&self) -> Option<Dtype> {
        let matrices = self.by_name.values().filter(|place| place.shape.len() == 2);
        let mut dtypes = matrices.map(|place| place.dtype);
        let first = dtypes.next()?;
        dtypes.all(|dtype| dtype == first).then_some(first)
    }

    /// A tensor's stored bytes, little endian, row-major; nothing is copied.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn bytes(&self, name: &str) -> Result<Bytes> {
        let place = self.place(name)?;
        Ok(self.shards[place.shard].bytes.slice(place.start..place.end))
    }

    /// Reads a tensor of a given shape, converted to `dtype` on the way.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Shape`] and [`Error::DType`] name the tensor.
    pub fn load(
        &self,
        name: &str,
        shape: &[usize],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        self.load_stacked(&[(name.to_owned(), shape.to_vec())], dtype, device)
    }

    /// Reads tensors that differ in their first dimension only, one below the other.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub(crate) fn load_stacked(
        &self,
        tensors: &[(String, Vec<usize>)],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let stored_as = |dtype| {
            let stored = |(name, _): &(String, _)| self.by_name.get(name).map(|place| place.dtype);
            tensors.iter().all(|tensor| stored(tensor) == Some(dtype))
        };
        match dtype {
            DType::F64 => self.stack::<f64>(tensors, device, decode_into),
            DType::BF16 if stored_as(Dtype::BF16) => self.stack(tensors, device, copy_bf16),
            _ => Ok(self
                .stack::<f32>(tensors, device, decode_into)?
                .to_dtype(dtype)?),
        }
    }

    fn stack<N: WithDType>(
        &self,
        tensors: &[(String, Vec<usize>)],
        device: &Device,
        decode_into: impl Fn(&str, Dtype, &[u8], &mut Vec<N>) -> Result<()>,
    ) -> Result<Tensor> {
        let len = tensors
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        let (mut values, mut stacked) = (huge_pages::vec(len), Vec::new());
        for (name, shape) in tensors {
            let (dtype, bytes) = self.stored(name, shape)?;
            decode_into(name, dtype, bytes, &mut values)?;
            match stacked.first_mut() {
                Some(rows) => *rows += shape[0],
                None => stacked.clone_from(shape),
            }
        }
        Ok(Tensor::from_vec(values, stacked, device)?)
    }

    /// A tensor of a given shape as it is stored: its number type, and its bytes.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] and [`Error::Shape`] name the tensor.
    pub(crate) fn stored(&self, name: &str, shape: &[usize]) -> Result<(Dtype, &[u8])> {
        let place = self.place(name)?;
        if place.shape != *shape {
            let (expected, actual) = (shape.to_vec(), place.shape.clone());
            return Err(Error::Shape {
                name: name.to_owned(),
                expected,
                actual,
            });
        }
        let bytes = &self.shards[place.shard].bytes[place.start..place.end];
        Ok((place.dtype, bytes))
    }

    /// Reads a tensor as f32, whatever its shape.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] and [`Error::DType`] name the tensor.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.load(name, &self.place(name)?.shape, DType::F32, &Device::Cpu)
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.by_name.get(name).ok_or_else(|| Error::MissingTensor {
            name: name.to_owned(),
            files: self.shards.len(),
        })
    }
}

fn read_header(file: &str, bytes: &[u8]) -> Result<Metadata> {
    let header = header_len(file, bytes.len() as u64, bytes.get(..8).unwrap_or(bytes))?;
    parse_header(file, bytes.len() as u64, &bytes[..header])
}

/// How many bytes from the start of a weight file its header takes, from the first eight of them.
///
/// # Errors
/// [`Error::Corrupt`] if it cannot be a header.
pub(crate) fn header_len(file: &str, file_len: u64, first_eight: &[u8]) -> Result<usize> {
    let corrupt = |reason: &str| Error::Corrupt {
        file: file.to_owned(),
        reason: reason.to_owned(),
    };
    let first_eight = first_eight
        .try_into()
        .map_err(|_| corrupt("shorter than a header"))?;
    match u64::from_le_bytes(first_eight).checked_add(8) {
        Some(len) if len <= file_len.min(MAX_HEADER) => Ok(len as usize),
        _ => Err(corrupt(
            "the header is longer than the file, or than any header should be",
        )),
    }
}

/// Checks a weight file's header without trusting a byte of it: every tensor lies inside the file,
/// none overlap, and together they fill it exactly.
///
/// # Errors
/// [`Error::Corrupt`] with the file's name.
pub(crate) fn parse_header(file: &str, file_len: u64, header: &[u8]) -> Result<Metadata> {
    let corrupt = |reason: String| Error::Corrupt {
        file: file.to_owned(),
        reason,
    };
    // Reading it checks each tensor's offsets against its shape and the one before.
    let metadata: Metadata =
        serde_json::from_slice(&header[8..]).map_err(|error| corrupt(error.to_string()))?;
    if metadata.data_len() as u64 != file_len - header.len() as u64 {
        let (promised, there) = (metadata.data_len(), file_len - header.len() as u64);
        return Err(corrupt(format!(
            "its header promises {promised} bytes of tensors, {there} are there"
        )));
    }
    Ok(metadata)
}

impl Index {
    /// Reads an index; a file name that leaves the folder is refused.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for an index that is not one.
    pub(crate) fn parse(index: &[u8]) -> Result<Self> {
        let corrupt = |reason: String| Error::Corrupt {
            file: INDEX_FILE.to_owned(),
            reason,
        };
        let index: Self =
            serde_json::from_slice(index).map_err(|error| corrupt(error.to_string()))?;
        let is_name = |name: &str| !name.contains(['/', '\\']) && name.ends_with(".safetensors");
        match index.weight_map.values().find(|name| !is_name(name)) {
            Some(name) => Err(corrupt(format!("{name:?} is not a weight file's name"))),
            None => Ok(index),
        }
    }

    /// The files it names, sorted.
    pub(crate) fn files(&self) -> BTreeSet<String> {
        self.weight_map.values().cloned().collect()
    }

    /// The tensors it promises, sorted.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &String> {
        self.weight_map.keys()
    }
}

pub(crate) fn missing_weights(folder: String) -> Error {
    Error::MissingFile {
        folder,
        file: SINGLE_FILE,
        next: "point to a model folder with safetensors weights (pickled weights are never read)",
    }
}

pub(crate) fn map_file(path: &Path) -> Result<Bytes> {
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.len() == 0 {
        return Ok(Bytes::new()); // An empty map is an error on some systems; an empty file is a corrupt one.
    }
    #[expect(
        unsafe_code,
        reason = "memory-mapping is what lets a model larger than memory open at once"
    )]
    // SAFETY: the map is read-only and private to this process. Rust needs the bytes not to change
    // under it: model files are written once, and `from_dir` asks its caller to leave them alone.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::from_owner(map))
}

/// Turns stored little-endian numbers into `F`, exactly where `F` is wide enough.
///
/// # Errors
/// [`Error::DType`] names the tensor.
pub(crate) fn decode<F: Real>(name: &str, dtype: Dtype, bytes: &[u8]) -> Result<Vec<F>> {
    let mut values = Vec::new();
    decode_into(name, dtype, bytes, &mut values)?;
    Ok(values)
}

pub(crate) fn decode_into<F: Real>(
    name: &str,
    dtype: Dtype,
    bytes: &[u8],
    values: &mut Vec<F>,
) -> Result<()> {
    fn each<const N: usize, F>(bytes: &[u8], values: &mut Vec<F>, read: impl Fn([u8; N]) -> F) {
        let (numbers, _) = bytes.as_chunks::<N>();
        values.extend(numbers.iter().map(|&number| read(number)));
    }
    match dtype {
        Dtype::F32 => each(bytes, values, |b| F::of_f32(f32::from_le_bytes(b))),
        Dtype::BF16 => each(bytes, values, |b| {
            F::of_f32(bf16::from_le_bytes(b).to_f32())
        }),
        Dtype::F16 => each(bytes, values, |b| F::of_f32(f16::from_le_bytes(b).to_f32())),
        Dtype::F64 => each(bytes, values, |b| F::of_f64(f64::from_le_bytes(b))),
        other => {
            return Err(Error::DType {
                name: name.to_owned(),
                dtype: format!("{other:?}"),
            });
        }
    }
    Ok(())
}

fn copy_bf16(_: &str, _: Dtype, bytes: &[u8], values: &mut Vec<bf16>) -> Result<()> {
    let (numbers, _) = bytes.as_chunks();
    values.extend(numbers.iter().map(|&number| bf16::from_le_bytes(number)));
    Ok(())
}

#[cfg(test)]
mod tests;
