//! What a message says of its own training: axolotl's `train` and `train_detail`, LLaMA-Factory's
//! `loss_weight`, OpenAI's `weight`.

use serde_json::{Map, Value};
use updraft_chat::{Content, Message, Role, TrainDetail};

/// Takes the flags out of a message's fields.
pub(super) fn read(fields: &mut Map<String, Value>, message: &mut Message) -> Result<(), String> {
    let weight_of = |key: &str| match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(weight) => (weight.as_f64())
            .map(|weight| Some(weight as f32))
            .ok_or_else(|| format!("has a {key} that is not a number")),
    };
    let said = match (flag(fields)?, weight_of("loss_weight")?) {
        (Some(train), _) => Some(f32::from(u8::from(train))),
        (None, Some(weight)) => Some(weight),
        // OpenAI knows weights of the assistant's messages only.
        (None, None) => weight_of("weight")?.filter(|_| message.role == Role::Assistant),
    };
    // Parts that are all left out stay so, whatever their message says.
    message.weight = message.weight.or(said);
    let details = match fields.shift_remove("train_detail") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(details)) => details,
        Some(_) => return Err("has a train_detail that is not a list".to_owned()),
    };
    if !matches!(message.content, Content::Text(_)) {
        return Err("has a train_detail and a content that is not one text".to_owned());
    }
    if message.train_detail.is_some() {
        return Err("has a train_detail and a train on its parts".to_owned());
    }
    let details: Result<Vec<_>, String> = details.iter().map(detail).collect();
    message.train_detail = Some(details?);
    Ok(())
}

/// One detail, its offsets in characters.
fn detail(value: &Value) -> Result<TrainDetail, String> {
    let odd = || "has a train_detail without begin_offset, end_offset and train".to_owned();
    let fields = value.as_object().ok_or_else(odd)?;
    let offset = |key: &str| {
        let offset = fields.get(key).and_then(Value::as_u64);
        offset
            .and_then(|at| usize::try_from(at).ok())
            .ok_or_else(odd)
    };
    let detail = TrainDetail {
        begin_offset: offset("begin_offset")?,
        end_offset: offset("end_offset")?,
        train: Some(flag(fields)?.ok_or_else(odd)?),
    };
    if detail.begin_offset > detail.end_offset {
        return Err("has a train_detail that ends before it begins".to_owned());
    }
    Ok(detail)
}

/// What `train` says, in JSON's words or in those of a table that has none for true and false.
pub(super) fn flag(fields: &Map<String, Value>) -> Result<Option<bool>, String> {
    let odd = || "has a train that is neither true nor false".to_owned();
    match fields.get("train") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(train)) => Ok(Some(*train)),
        Some(Value::Number(number)) if number.as_f64() == Some(0.0) => Ok(Some(false)),
        Some(Value::Number(number)) if number.as_f64() == Some(1.0) => Ok(Some(true)),
        Some(Value::String(word)) => match &*word.to_ascii_lowercase() {
            "true" | "1" => Ok(Some(true)),
            "false" | "0" => Ok(Some(false)),
            _ => Err(odd()),
        },
        Some(_) => Err(odd()),
    }
}

/// The flags of a message's text parts, which become one text.
#[derive(Debug, Default)]
pub(super) struct PartFlags(Vec<(usize, Option<bool>)>);

impl PartFlags {
    pub(super) fn push(&mut self, text: &str, flag: Option<bool>) {
        self.0.push((text.chars().count(), flag));
    }

    /// The same for the message of all the texts: if no part is trained, it is not; if a part says
    /// anything, they are its details.
    pub(super) fn put(self, message: &mut Message) {
        let is_no = |(_, flag): &(usize, Option<bool>)| *flag == Some(false);
        if !self.0.is_empty() && self.0.iter().all(is_no) {
            message.weight = Some(0.0);
        } else if self.0.iter().any(|(_, flag)| flag.is_some()) {
            message.train_detail = Some(self.into_details());
        }
    }

    fn into_details(self) -> Vec<TrainDetail> {
        let mut begin_offset = 0;
        let details = self.0.into_iter().filter(|&(chars, _)| chars > 0);
        let details = details.map(|(chars, train)| {
            let detail = TrainDetail {
                begin_offset,
                end_offset: begin_offset + chars - 1,
                train,
            };
            begin_offset += chars;
            detail
        });
        details.collect()
    }
}
