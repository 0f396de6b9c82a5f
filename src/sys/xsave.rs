//! Where this processor has the components of its XSAVE area.

use std::arch::x86_64::__cpuid_count;

/// Returns the offset of a component in the standard form of the area, as
/// `CPUID.(EAX=0DH, ECX=number):EBX` has it; `None` if the processor does not have
/// the component.
pub fn offset(number: u32) -> Option<usize> {
    const LEAF: u32 = 0xd;
    let component = __cpuid_count(LEAF, number);
    (component.eax != 0 && component.ebx != 0).then_some(component.ebx as usize)
}
