//! Where this processor has the components of its XSAVE area.

use std::arch::x86_64::{__cpuid_count, CpuidResult};

/// Asks for a component (`CPUID.(EAX=0DH, ECX=number)`); `None` if the processor does not
/// have it.
fn component(number: u32) -> Option<CpuidResult> {
    const LEAF: u32 = 0xd;
    let component = __cpuid_count(LEAF, number);
    (component.eax != 0 && component.ebx != 0).then_some(component)
}

/// Returns the offset of a component in the standard form of the area; `None` if the
/// processor does not have the component.
pub fn offset(number: u32) -> Option<usize> {
    component(number).map(|component| component.ebx as usize)
}

/// Returns where a component ends in the standard form of the area; `None` if the
/// processor does not have the component.
pub fn end(number: u32) -> Option<usize> {
    component(number).map(|component| component.ebx as usize + component.eax as usize)
}
